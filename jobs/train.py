"""Train a model: python jobs/train.py --config jobs/configs/tiny_gpt.yaml --training.zero_stage=3"""

from modelyard.cli.main import run
from modelyard.cli.train import train_command

if __name__ == "__main__":
    run(train_command)
