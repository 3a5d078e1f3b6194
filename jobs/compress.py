"""Compress a model: python jobs/compress.py models:/tiny-gpt --recipe jobs/configs/compress_int8.yaml"""

from modelyard.cli.compress import compress_command
from modelyard.cli.main import run

if __name__ == "__main__":
    run(compress_command)
