"""Search over fields of a training config: python jobs/tune.py --config jobs/configs/tune_digits.yaml --trials=8"""

from modelyard.cli.main import run
from modelyard.cli.tune import tune_group

if __name__ == "__main__":
    run(tune_group)
