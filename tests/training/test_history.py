"""The history of a run survives its Parquet file."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.training.history import History

values = st.one_of(st.floats(allow_nan=False), st.integers(-(2**60), 2**60))
columns = {
    "loss": st.floats(allow_nan=False),
    "epoch": st.integers(0, 9),
    "samples": st.lists(st.integers(0, 99), min_size=1),
}
records = st.fixed_dictionaries({"step": st.integers(0, 10**9)}, optional=columns)


@settings(deadline=None, max_examples=40)
@given(st.lists(records, min_size=1, max_size=8))
def test_every_record_comes_back_as_it_was(rows: list[dict]) -> None:
    history = History()
    for row in rows:
        history.add(row)
    assert History.from_parquet(history.to_parquet()).records == rows


def test_an_empty_history_comes_back_empty(tmp_path: Path) -> None:
    path = tmp_path / "history.parquet"
    path.write_bytes(History().to_parquet())
    assert History.from_parquet(path).records == []


def test_a_series_leaves_out_records_without_the_field() -> None:
    history = History([{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 3.0}, {"step": 2, "loss": None}])
    assert history.series("loss") == [(1, 2.0)]


def test_a_record_is_a_copy_of_what_was_added() -> None:
    history, record = History(), {"step": 1}
    history.add(record)
    record["step"] = 2
    assert history.records == [{"step": 1}]
