"""The logged steps and validations of a run, kept with each checkpoint so that they roll back with the model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Records in order; each has a `step` and whatever was measured there."""

    def __init__(self, records: list[dict[str, Any]] | None = None) -> None:
        self.records = records or []

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record, e.g. `{"step": 3, "loss": 2.1}`."""
        self.records.append(dict(record))

    def series(self, field: str) -> list[tuple[int, float]]:
        """(step, value) of every record that has `field`."""
        return [(r["step"], r[field]) for r in self.records if r.get(field) is not None]

    def to_parquet(self) -> bytes:
        """All records as one Parquet file; a field that some records lack is null there."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = dict.fromkeys(key for record in self.records for key in record)
        table = pa.table({field: [record.get(field) for record in self.records] for field in fields})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, source: Path | bytes) -> History:
        """What `to_parquet` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(source) if isinstance(source, bytes) else source)
        rows = table.to_pylist()
        return cls([{key: value for key, value in row.items() if value is not None} for row in rows])
