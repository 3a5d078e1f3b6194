"""The way to a cluster's dashboard, which listens on the head's loopback only: a port forwarded through ssh."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from modelyard.clusters import launch
from modelyard.clusters.files import ClusterFile
from modelyard.errors import WaitTimeoutError

DASHBOARD_PORT = 8265


@contextlib.contextmanager
def dashboard(file: ClusterFile, timeout_s: float = 60.0) -> Iterator[str]:
    """The address on this machine at which the cluster's dashboard answers while the context lasts.

    Raises:
        AccessError, UnavailableError: the head refuses the key, or does not answer.
        WaitTimeoutError: there was no way in `timeout_s`.
    """
    port = _free_port()
    if file.kind == "local":
        forward = f"127.0.0.1:{port}:127.0.0.1:{DASHBOARD_PORT}"
        options = launch.ssh_command(file, "-N", "-L", forward, "-o", "ExitOnForwardFailure=yes")
        words = [*options, "-o", "ServerAliveInterval=15", launch.target(file, launch.head_address(file))]
    else:  # Ray knows the cloud's key and address
        words = [sys.executable, "-m", "ray.scripts.scripts", "dashboard", str(file.path), "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ), start_new_session=True
        )
        try:
            _await(file, process, port, log, timeout_s)
            yield f"http://127.0.0.1:{port}"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):  # Ray's command has an ssh of its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def _await(file: ClusterFile, process: subprocess.Popen[bytes], port: int, log: IO[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if process.poll() is not None:
            log.seek(0)
            raise launch.refusal(file, launch.head_address(file), log.read())
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"a way to the head of {file.path}", timeout_s, "--timeout-s") from None
            time.sleep(0.1)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
