"""The scheduler's journal loses nothing that was acknowledged and believes nothing that was changed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sql

from modelyard.errors import IntegrityError, StorageError
from modelyard.scheduling.journal import Journal


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'journal.db'}"


def change(url: str, statement: str) -> None:
    with sql.create_engine(url).begin() as connection:
        connection.execute(sql.text(statement))


def written(url: str, count: int = 3) -> Journal:
    journal = Journal(url, clock=lambda: 7.0)
    journal.read()
    for number in range(count):
        journal.append(("held", {"job": f"job-{number}", "is_held": True}))
    return journal


def test_events_come_back_in_order_with_their_time(url: str) -> None:
    written(url)
    found = Journal(url).read()
    assert [event.body["job"] for event in found] == ["job-0", "job-1", "job-2"]
    assert {(event.at_s, event.kind) for event in found} == {(7.0, "held")}


def test_appending_goes_on_after_a_restart(url: str) -> None:
    written(url, 2)
    again = Journal(url)
    again.read()
    again.append(("cancelled", {"job": "job-0"}))
    assert [event.kind for event in Journal(url).read()] == ["held", "held", "cancelled"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("UPDATE scheduler_events SET body = '{}' WHERE line = 2", "line 2 .*was changed"),
        ("UPDATE scheduler_events SET at_s = 8 WHERE line = 3", "line 3 .*was changed"),
        ("UPDATE scheduler_events SET kind = 'x' WHERE line = 1", "line 1 .*was changed"),
        ("DELETE FROM scheduler_events WHERE line = 2", "line 2 is missing"),
        ("DELETE FROM scheduler_events WHERE line = 1", "line 1 is missing"),
    ],
)
def test_a_damaged_line_is_named_with_the_way_back(url: str, damage: str, words: str) -> None:
    written(url)
    change(url, damage)
    with pytest.raises(IntegrityError, match=words) as caught:
        Journal(url).read()
    assert "modelyard scheduler recover" in caught.value.todo


def test_a_journal_cut_before_the_damage_can_be_read_again(url: str) -> None:
    written(url)
    change(url, "UPDATE scheduler_events SET body = '{}' WHERE line = 2")
    assert Journal(url).cut(2) == 2
    assert [event.body["job"] for event in Journal(url).read()] == ["job-0"]


def test_a_second_writer_is_refused(url: str) -> None:
    first, second = written(url, 1), Journal(url)
    second.read()
    first.append(("cancelled", {"job": "job-0"}))
    with pytest.raises(IntegrityError, match="another scheduler"):
        second.append(("cancelled", {"job": "job-1"}))


def test_several_events_are_written_all_or_none(url: str) -> None:
    journal = written(url, 1)
    with pytest.raises(ValueError, match="Out of range"):
        journal.append(("priority", {"job": "a"}), ("priority", {"priority": float("nan")}))
    assert len(Journal(url).read()) == 1


@pytest.mark.parametrize("bad", ["sqlite:////nowhere/at/all/journal.db", "no-such-database://host/x"])
def test_a_database_out_of_reach_is_a_storage_error(bad: str) -> None:
    with pytest.raises((StorageError), match="scheduler journal"):
        Journal(bad)


def test_a_password_is_not_shown(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        Journal("sqlite+nothing://me:secret@host/x")
    assert "secret" not in str(caught.value)


WRITER = """
import sys
from modelyard.scheduling.journal import Journal
journal = Journal(sys.argv[1])
journal.read()
for number in range(100_000):
    journal.append(("held", {"job": str(number), "is_held": True}))
    print(number, flush=True)
"""


def test_what_was_acknowledged_before_a_kill_is_there(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(40):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    acknowledged = max([acknowledged, *map(int, rest)])
    found = [int(event.body["job"]) for event in Journal(url).read()]
    assert found == list(range(len(found)))
    assert len(found) >= acknowledged + 1
