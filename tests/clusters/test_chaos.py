"""Three faults of `benchmarks/chaos.py` on real hosts, met by one run: none costs a row, or a call.

Where there is a redis-server, it keeps the head's state.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.clusters.hosts import why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
FAULTS = ("worker", "link10", "head")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the three faults did, by name."""
    if reason := why_not():
        pytest.skip(f"hosts of network namespaces: {reason}")
    path = tmp_path_factory.mktemp("chaos") / "out.json"
    command = [sys.executable, str(SCRIPT), "--only", *FAULTS, "--together", "--json", str(path)]
    command += ["--redis"] if shutil.which("redis-server") else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as script:
        try:
            said = script.communicate(timeout=840)[0]
        except BaseException:
            script.terminate()  # it takes its hosts with it
            raise
    assert script.returncode == 0, said[-9000:]
    return {each["fault"]: each for each in json.loads(path.read_text())}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_ends_with_exactly_the_rows_of_an_undisturbed_one(
    outcomes: dict[str, dict[str, Any]], fault: str
) -> None:
    assert outcomes[fault]["rows"] == "exact"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cluster_is_whole_again_by_itself(outcomes: dict[str, dict[str, Any]], fault: str) -> None:
    assert outcomes[fault]["mended_s"] is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_no_call_fails_and_no_answer_changes(outcomes: dict[str, dict[str, Any]], fault: str) -> None:
    assert outcomes[fault]["asked"] > 20
    assert outcomes[fault]["failed"] == 0, outcomes[fault]["failures"]
    assert outcomes[fault]["wrong"] == 0
