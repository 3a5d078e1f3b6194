"""Keeping a head alive: a process beside Ray that starts the head again when a part of it has died.

The state of the cluster (nodes, detached actors, Serve's applications, jobs) is on disk or in Redis, so a head that
comes back finds it, and the other nodes join it again. `ray stop` is taken at its word: what was stopped stays stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import psutil  # type: ignore[import-untyped]

from modelyard.clusters.certs import CA_CERT, HEAD_ENV, NODE_CERT, NODE_KEY, REDIS_CA
from modelyard.config import settings
from modelyard.errors import ConfigError, StartError, WaitTimeoutError

PASSWORD = "MODELYARD_REDIS_PASSWORD"
"""In `head.env`; becomes an option of `ray start`, which takes it in no other way."""
NAMESPACE = "RAY_external_storage_namespace"
REDIS = "RAY_REDIS_ADDRESS"
STARTED = "Ray runtime started."
DEFAULT_PORT = 6379
"""Of Ray's GCS."""
POLL_S = 0.5
STOPPED_AFTER_S = 30.0
"""Both main processes have been gone for so long, and Ray has not called it a failure: somebody stopped it."""
RAYLET_AFTER_S = 30.0
"""`ray stop` ends the raylet first, and waits for it; longer than that, it is a fault."""
GCS_AFTER_S = 5.0
"""A raylet without the GCS of its head is always a fault."""
LONGEST_PAUSE_S = 30.0
CALM_S = 60.0
"""A head that has lived so long starts again without a pause."""
END_TIMEOUT_S = 10.0
ATTEMPTS = 3
"""So often a head may fail at first: on a busy machine it does, and is there a minute later."""

Step = Literal["wait", "restart", "end"]


@dataclass(frozen=True)
class Look:
    """A head at one moment."""

    exit_code: int | None
    """Of `ray start --block`; None while it runs."""
    has_gcs: bool
    has_raylet: bool
    same_for_s: float
    """How long the two have been as they are."""


def judge(look: Look) -> Step:
    """What to do about a head. Pure."""
    if look.exit_code is not None:
        return "restart"
    if look.has_gcs and look.has_raylet:
        return "wait"
    if not look.has_gcs and not look.has_raylet:
        return "end" if look.same_for_s >= STOPPED_AFTER_S else "wait"
    patience_s = RAYLET_AFTER_S if look.has_gcs else GCS_AFTER_S
    return "restart" if look.same_for_s >= patience_s else "wait"


def pause_s(lived_s: float, failures: int) -> float:
    """Seconds to wait before the next start: none after a calm life, else more each time. Pure."""
    return 0.0 if lived_s >= CALM_S or failures == 0 else min(LONGEST_PAUSE_S, 2.0 ** (failures - 1))


def environment(folder: Path, storage: Path, given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables and options with which a head keeps its state: in Redis when `head.env` names one, else on its disk.

    Args:
        folder: of certificates.
        storage: folder for the state on disk.
        given: the environment so far; what it says about the state stays.
    """
    found = read_variables(folder / HEAD_ENV)
    password = found.pop(PASSWORD, "")
    if REDIS in found or REDIS in given:
        tls = {"RAY_REDIS_CA_CERT": REDIS_CA if (folder / REDIS_CA).exists() else CA_CERT}
        tls |= {"RAY_REDIS_CLIENT_CERT": NODE_CERT, "RAY_REDIS_CLIENT_KEY": NODE_KEY}
        files = {name: str(folder / file) for name, file in tls.items() if (folder / file).exists()}
        return {**files, **found, **given}, [f"--redis-password={password}"] if password else []
    disk = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(storage)}
    return {**disk, **found, **given}, []


def read_variables(path: Path) -> dict[str, str]:
    """The `export NAME=VALUE` lines of a file; none when it is not there."""
    if not path.exists():
        return {}
    words = shlex.split(path.read_text(), comments=True)
    return dict(word.split("=", 1) for word in words if "=" in word)


def keep(command: Sequence[str], folder: Path, timeout_s: float) -> int:
    """Start a head and the process that keeps it; returns the pid of the latter once the head runs.

    Args:
        command: `ray start --head ...`.
        folder: of certificates.
        timeout_s: longest wait for the head.

    Raises:
        ConfigError: the command starts no head, a head is kept here already, or its port is taken.
        StartError: Ray did not start; its output is in the error.
        WaitTimeoutError: it took too long.
    """
    if list(command[:2]) != ["ray", "start"] or "--head" not in command:
        raise ConfigError(
            f"{shlex.join(command)!r} starts no head", "modelyard cluster keep-head -- ray start --head ..."
        )
    if (old := running()) is not None:
        raise ConfigError(f"process {old.pid} keeps a head here already", "modelyard cluster keep-head --stop")
    _refuse_taken_port(command)
    _home().mkdir(parents=True, exist_ok=True, mode=0o700)
    words = [sys.executable, "-m", "modelyard.clusters.keeper", str(folder), *command]
    with _log().open("wb") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True
        )
    deadline = time.monotonic() + timeout_s
    while STARTED not in (said := _log().read_text(errors="replace")):
        if process.poll() is not None or _starts(said) > ATTEMPTS:
            stop()
            raise StartError(f"the head did not start:\n{said[-2000:]}", f"its output is in {_log()}")
        if time.monotonic() > deadline:
            stop()
            raise WaitTimeoutError("the head to start", timeout_s, "--timeout-s")
        time.sleep(POLL_S)
    return process.pid


def stop() -> bool:
    """End the kept head and its keeper; whether there was one."""
    keeper = running()
    if keeper is None:
        return False
    family = _family(keeper.pid)
    keeper.terminate()  # it ends its head
    psutil.wait_procs([keeper], timeout=2 * END_TIMEOUT_S)
    _kill([keeper, *family])
    _note().unlink(missing_ok=True)
    return True


def forget(folder: Path) -> None:
    """Remove the kept state, so that the next head starts a new cluster."""
    variables, options = environment(folder, storage_folder(), os.environ)
    if REDIS not in variables:
        shutil.rmtree(storage_folder(), ignore_errors=True)
        return
    os.environ.update({name: value for name, value in variables.items() if name.startswith("RAY_")})
    from ray._private.gcs_utils import cleanup_redis_storage
    from ray._private.services import get_address

    host, port, is_tls = get_address(variables[REDIS])
    password = options[0].partition("=")[2] if options else ""
    cleanup_redis_storage(host, int(port), password, is_tls, variables.get(NAMESPACE, "default"))


def running() -> psutil.Process | None:
    """The process that keeps this machine's head, if there is one."""
    try:
        stored = json.loads(_note().read_text())
        process = psutil.Process(int(stored["pid"]))
        return process if process.create_time() == stored["since"] else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def storage_folder() -> Path:
    """Where a head without Redis keeps the cluster's state."""
    return _home() / "state"


class Keeper:
    """Starts the head, looks at it, starts it again. Runs in a process of its own."""

    def __init__(self, command: Sequence[str], folder: Path, log: IO[str]) -> None:
        variables, options = environment(folder, storage_folder(), os.environ)
        program = str(Path(sys.executable).with_name("ray"))
        self._command = [program if Path(program).exists() else command[0], *command[1:], "--block", *options]
        self._environment = variables
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    def run(self) -> None:
        """Until the head is stopped by hand, or this process gets SIGTERM."""
        failures = 0
        while True:
            began = time.monotonic()
            step = self._live()
            self.close()
            if step == "end":
                self._say("Ray was stopped here: nothing is left to keep")
                return
            lived_s = time.monotonic() - began
            failures = 1 if lived_s >= CALM_S else failures + 1
            wait_s = pause_s(lived_s, failures - 1)
            self._say(f"the head died after {lived_s:.0f} s; it starts again" + (f" in {wait_s:g} s" if wait_s else ""))
            time.sleep(wait_s)

    def _live(self) -> Step:
        self._say(f"starting: {shlex.join(word for word in self._command if not word.startswith('--redis-password'))}")
        self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=self._environment)
        was, since, has_begun = (False, False), time.monotonic(), False
        while True:
            time.sleep(POLL_S)
            names = {_name(each) for each in _children(self._child.pid)}
            # one that has lost its parent, as a job's script does with a head that dies, still belongs to it
            self._family = list({*_family(self._child.pid), *(each for each in self._family if each.is_running())})
            now = ("gcs_server" in names, "raylet" in names)
            has_begun = has_begun or all(now)
            if now != was:
                was, since = now, time.monotonic()
            look = Look(self._child.poll(), *now, time.monotonic() - since)
            step = judge(look) if has_begun or look.exit_code is not None else "wait"
            if step != "wait":
                return step

    def close(self) -> None:
        """End all that the head started; politely it would wait half a minute for what runs on it."""
        if self._child is None:
            return
        everyone = [*self._family, *_family(self._child.pid)]
        self._child.kill()
        _kill(everyone)
        self._child.wait(END_TIMEOUT_S)
        self._child, self._family = None, []

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=self._log, flush=True)


def main(words: Sequence[str]) -> None:
    """The keeper's own process: FOLDER COMMAND..."""
    keeper = Keeper(words[1:], Path(words[0]), sys.stderr)
    _note().write_text(json.dumps({"pid": os.getpid(), "since": psutil.Process().create_time()}))

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.close()
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    keeper.run()
    _note().unlink(missing_ok=True)


def _refuse_taken_port(command: Sequence[str]) -> None:
    """Two clusters cannot share a port; Ray itself would say so late, and in its logs."""
    given = [word.partition("=")[2] for word in command if word.startswith("--port=")]
    port = int(given[0]) if given and given[0].isdigit() else DEFAULT_PORT
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            todo = "end the other cluster (ray stop, as its user), or give another --port in every start command"
            raise ConfigError(f"port {port} is taken{_taken_by(port)}: {error.strerror}", todo) from None


def _taken_by(port: int) -> str:
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f" by process {each.pid} ({_name(psutil.Process(each.pid))})"
    except psutil.Error:
        pass  # it is another user's
    return ""


def _starts(said: str) -> int:
    return sum(" starting: " in line for line in said.splitlines())


def _family(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return [each for each in psutil.Process(pid).children() if each.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _home() -> Path:
    return settings().home / "head"


def _note() -> Path:
    return _home() / "keeper.json"


def _log() -> Path:
    return _home() / "keeper.log"


if __name__ == "__main__":
    main(sys.argv[1:])
