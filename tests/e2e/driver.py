"""A driver in a process of its own, to be killed: python driver.py CONFIG.yaml RECORDS.jsonl [OVERRIDE ...]"""

import json
import sys
from pathlib import Path

import modelyard


def main() -> None:
    """Train, append each record to RECORDS.jsonl, and at the end write what the run was to RECORDS.jsonl.result."""
    config, records, *overrides = sys.argv[1:]

    def note(record: dict) -> None:
        with Path(records).open("a") as file:
            file.write(json.dumps(record) + "\n")

    run = modelyard.train(config, *overrides, on_record=note, progress=False)
    result = {
        "model": run.model,
        "digest": run.digest,
        "run_id": run.run_id,
        "metrics": dict(run.metrics),
        "losses": [loss for _, loss in run.history.series("loss")],
        "samples": [sample for record in run.history.records for sample in record.get("samples", [])],
        "workers": [int(n) for _, n in run.history.series("num_workers")],
    }
    Path(f"{records}.result").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
