"""Prepare a dataset: python jobs/prepare.py --config jobs/configs/pydocs.yaml --text.block_tokens=128"""

from modelyard.cli.data import prepare_command
from modelyard.cli.main import run

if __name__ == "__main__":
    run(prepare_command)
