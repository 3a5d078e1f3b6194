"""Measure a registered model: `python jobs/evaluate.py --config jobs/configs/evaluate_tiny_gpt.yaml`."""

from modelyard.cli.evaluate import evaluate
from modelyard.cli.main import run

if __name__ == "__main__":
    run(evaluate)
