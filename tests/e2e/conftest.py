"""Drivers that can be killed, and a view on the worker processes behind them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

DRIVER = Path(__file__).with_name("driver.py")


class Driver:
    """One `driver.py` process."""

    def __init__(self, config: Path, records: Path, overrides: tuple[str, ...], environment: dict[str, str]) -> None:
        self._records = records
        self._log = records.with_suffix(".log")
        with self._log.open("ab") as log:
            command = [sys.executable, str(DRIVER), str(config), str(records), *overrides]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind that the driver has seen so far."""
        lines = self._records.read_text().splitlines() if self._records.exists() else []
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def wait_for(self, claim: str, condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
        """Until `condition()` is true; fails with the driver's log when it ends or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"never happened: {claim}; the driver said:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until the driver has seen that step done."""
        self.wait_for(f"step {step}", lambda: any(r["step"] >= step for r in self.records("step")))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(30)

    def result(self, timeout_s: float = 180.0) -> dict[str, Any]:
        """Wait for the end; what the run made."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -1
        assert code == 0, self._log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(Path(f"{self._records}.result").read_text())
        return result


@pytest.fixture
def start_driver(tmp_path: Path, ray_cluster: str) -> Iterator[Callable[..., Driver]]:
    """Starts drivers on the session's cluster; any still running at the end are killed."""
    drivers: list[Driver] = []

    def start(config: Path, name: str, *overrides: str, **environment: str) -> Driver:
        driver = Driver(config, tmp_path / f"{name}.jsonl", overrides, {"RAY_ADDRESS": ray_cluster, **environment})
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.kill()


@pytest.fixture
def worker_processes(ray_cluster: str) -> Callable[[], list[psutil.Process]]:
    """Lists the Ray Train worker processes of the session's cluster, a child of this process."""
    return _worker_processes


def _worker_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found
