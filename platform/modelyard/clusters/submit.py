"""Running a job script on a cluster: what goes along, how it is followed, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.clusters.files import POOL
from modelyard.errors import AccessError, ConfigError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "node_modules",
    "mlruns",
    "__pycache__",
    "*.egg-info",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    ".import_linter_cache",
    "*.pyc",
)
"""Never sent: what can be made anew, and what is no part of the code."""
MAX_MIB = 200
"""Larger working directories are refused: data belongs into the store."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOST = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
)
"""What Ray says of a job whose node is gone."""
NODE_LOST_S = 60.0
"""After a job's script is gone, Ray has missed its node by then if that is gone as well."""
STOPPED_CODE = 130
_POLL_S = 1.0
REQUEST_TIMEOUT_S = 60.0
"""Longest silence of the dashboard within one call."""
SILENT_LOG_S = 300.0
"""After so long without a line the connection is made anew, for it may be dead."""
_ID = re.compile(r"[A-Za-z0-9._-]+")
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's client takes these before the address that it is given."""
_NOISY = (
    "ray.dashboard",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env",
)
"""They tell of every file and connection; two set their own level when they are imported."""
_NOT_READY = "No available agent"
"""What Ray's dashboard says until the first node's agent has reported to it."""


@dataclass(frozen=True)
class Job:
    """What is to be run, and with what."""

    entrypoint: str
    working_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    with_code: bool = True
    """Send `platform/modelyard` of the working directory, so that the job runs the code that is here."""
    submission_id: str | None = None
    pool: str | None = None
    """Where the script itself runs; None: on the head, and with it."""

    @property
    def selector(self) -> dict[str, str] | None:
        """Ray label selector of the script's node."""
        return {POOL: self.pool} if self.pool else None

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment for it."""
        package = self.working_dir / "platform" / "modelyard"
        code = {"py_modules": [str(package)]} if self.with_code and package.is_dir() else {}
        variables = {"env_vars": dict(self.environment)} if self.environment else {}
        return {"working_dir": str(self.working_dir), "excludes": list(EXCLUDES), **code, **variables}


def prepare(
    script: Path,
    arguments: Sequence[str],
    working_dir: Path | None = None,
    lease: Mapping[str, Any] | None = None,
    **others: Any,
) -> Job:
    """Work out what a script needs. Reads the disk, calls nobody.

    Args:
        script: a Python file within `working_dir`.
        arguments: of the script.
        working_dir: sent to the cluster; by default the nearest folder above the script with a pyproject.toml,
            else the current one.
        lease: fields of the config's `lease`, given as overrides; those that are None are left out.
        others: fields of `Job`.

    Raises:
        NotFoundError: there is no such script, or no such working directory.
        ConfigError: it is outside the working directory, the directory is too large to send, or `submission_id` is
            no name.
    """
    if (name := others.get("submission_id")) is not None and not _ID.fullmatch(name):
        raise ConfigError(f"--id {name!r} is no name for a job", "use letters, digits, `.`, `_` and `-`")
    if not script.is_file():
        raise NotFoundError(f"no script {str(script)!r}", "name a Python file, e.g. jobs/train.py")
    folder = (working_dir or _root_of(script)).absolute()
    if not folder.is_dir():
        raise NotFoundError(f"no folder {str(folder)!r}", "name one with --working-dir")
    absolute = script.absolute()
    if not absolute.is_relative_to(folder):
        raise ConfigError(f"{str(script)!r} is outside the working directory {str(folder)!r}", "set --working-dir")
    refuse_large(folder)
    words = ["python", str(absolute.relative_to(folder)), *arguments]
    words += [f"--lease.{name}={value}" for name, value in (lease or {}).items() if value is not None]
    return Job(shlex.join(words), folder, **others)


def refuse_large(folder: Path, max_mib: float = MAX_MIB) -> None:
    """Raise ConfigError when too much would be sent, or what cannot be; it names the files."""
    for strange in _strange(folder):
        raise ConfigError(f"{str(strange)!r} is no file that can be sent", "remove it, or set --working-dir")
    sizes = {path: path.stat().st_size for path in _sent(folder)}
    total = sum(sizes.values()) / 2**20
    if total > max_mib:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        names = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:.0f} MiB)" for path in largest)
        raise ConfigError(
            f"{str(folder)!r} holds {total:.0f} MiB, above {max_mib:g}: {names}",
            "move data out of it, or set --working-dir to a smaller folder",
        )


def connect(address: str, token: str | None, timeout_s: float = REQUEST_TIMEOUT_S) -> JobSubmissionClient:
    """A client for the dashboard at `address`, whatever Ray's variables say.

    Args:
        timeout_s: longest wait for its first answer.

    Raises:
        AccessError: it wants a token, or another one.
        UnavailableError: nothing answers there.
    """
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        longest_s = timeout_s

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=self.longest_s, **options)

    headers = {"Authorization": f"Bearer {token}"} if token else None
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        with translated(address):
            client = Client(address, headers=headers)
    finally:
        os.environ.update(hidden)
    client.longest_s = REQUEST_TIMEOUT_S
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    return client


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into our errors."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UnavailableError(f"no cluster answers at {address}", "see modelyard status, or give --cluster") from error
    except (RuntimeError, AuthenticationError) as error:
        text = str(error)
        if isinstance(error, AuthenticationError) or "status code 401" in text or "status code 403" in text:
            raise AccessError(
                f"the cluster at {address} refuses: no token, or a wrong one",
                "it is in ~/.modelyard/cluster/token of who started it; set RAY_AUTH_TOKEN, or --token-file",
            ) from error
        said = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
        todo = "choose another --id" if "already exists" in said else "see the head's logs"
        raise UnavailableError(f"the cluster at {address} refused the job: {said[:500]}", todo) from error


def start(client: JobSubmissionClient, job: Job, address: str, patience_s: float = 60.0) -> str:
    """Send the job; returns its id. A cluster that has only just started gets `patience_s` to become ready.

    Raises:
        AccessError, UnavailableError: as `connect`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with translated(address):
                return str(
                    client.submit_job(
                        entrypoint=job.entrypoint,
                        runtime_env=job.runtime_env,
                        submission_id=job.submission_id,
                        entrypoint_label_selector=job.selector,
                    )
                )
        except UnavailableError as error:
            if _NOT_READY not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def follow(
    client: JobSubmissionClient,
    job_id: str,
    write: Callable[[str], None],
    patience_s: float = 300.0,
    read: Callable[[], str | None] | None = None,
) -> int:
    """Write the job's output as it comes, until it ends; returns its exit code.

    A connection that breaks is made anew for up to `patience_s`, and no line is written twice. `read` gives all that
    has been printed, where the dashboard cannot.

    Raises:
        UnavailableError: the cluster was silent for longer.
    """
    import aiohttp

    output = _Output(write)
    heard = time.monotonic()
    while True:
        try:
            if read is not None:
                output.complete(read() or "")
            else:
                with contextlib.suppress(asyncio.CancelledError):
                    asyncio.run(_tail(client, job_id, output))
            info = client.get_job_info(job_id)
            heard = time.monotonic()
            if info.status in ENDED:
                with contextlib.suppress(RuntimeError):  # they went with their node
                    output.complete(client.get_job_logs(job_id) if read is None else read() or "")
                return _code(info)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if time.monotonic() - heard > patience_s:
                raise UnavailableError(
                    f"nothing was heard of job {job_id} for {patience_s:g} s: {error}",
                    f"it may go on: ray job status {job_id}",
                ) from error
        time.sleep(_POLL_S)


def pools_with_nodes(client: JobSubmissionClient, address: str) -> set[str]:
    """The pools that have a node now; none when the dashboard does not tell.

    Raises:
        AccessError, UnavailableError: as `connect`.
    """
    return {str(node["labels"].get(POOL)) for node in _living(client, address) or () if node.get("labels")}


def was_lost(client: JobSubmissionClient, job_id: str, address: str, patience_s: float = NODE_LOST_S) -> bool:
    """Whether a job that failed did so with its node, and not by itself.

    Ray can lose sight of a short script whose node lives on, and which ran to its end: that one is not lost. A node
    that has just died counts as living until Ray has missed it, for which this waits `patience_s`.

    Raises:
        AccessError, UnavailableError: as `connect`.
    """
    with translated(address):
        info = client.get_job_info(job_id)
    error_type = getattr(info.error_type, "value", info.error_type)
    if info.status != "FAILED" or info.driver_exit_code is not None or error_type not in LOST:
        return False
    deadline = time.monotonic() + patience_s
    while True:
        living = _living(client, address)
        if living is not None and info.driver_node_id not in {node["node_id"] for node in living}:
            return True
        if time.monotonic() > deadline:
            return living is None  # nobody knows: then Ray's word counts
        time.sleep(_POLL_S)


def why(client: JobSubmissionClient, job_id: str, address: str) -> str:
    """What Ray says of a job that has failed without an exit code; empty when it has one.

    Raises:
        AccessError, UnavailableError: as `connect`.
    """
    with translated(address):
        info = client.get_job_info(job_id)
    return "" if info.driver_exit_code is not None or info.status != "FAILED" else str(info.message or "").strip()


def _living(client: JobSubmissionClient, address: str) -> list[dict[str, Any]] | None:
    """The nodes that are alive, as the dashboard has them; None when it does not tell."""
    with translated(address):
        answer = client._do_request("GET", "/api/v0/nodes?limit=10000")
    if answer.status_code != 200:
        return None
    return [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]


class _Output:
    """Writes a growing text once, whatever part of it comes again."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._skip = write, 0, 0

    def restart(self) -> None:
        """The text comes from its beginning again."""
        self._skip = self._written

    def add(self, text: str) -> None:
        """The next part."""
        new = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        self._written += len(new)
        if new:
            self._write(new)

    def complete(self, whole: str) -> None:
        """The whole text."""
        self.restart()
        self.add(whole)


async def _tail(client: JobSubmissionClient, job_id: str, output: _Output) -> None:
    output.restart()
    parts = aiter(client.tail_job_logs(job_id))
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        while True:
            output.add(await asyncio.wait_for(anext(parts), SILENT_LOG_S))


def _code(info: Any) -> int:
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED_CODE
    return int(info.driver_exit_code) or 1 if info.driver_exit_code is not None else 1


def _root_of(script: Path) -> Path:
    here = Path.cwd()
    above = (folder for folder in script.absolute().parents if (folder / "pyproject.toml").exists())
    return next(above, here)


def _sent(folder: Path) -> Iterator[Path]:
    """What Ray will send: it leaves out what the excludes and the .gitignore files name."""
    words = ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        answer = subprocess.CompletedProcess(words, 1, "", "")
    if answer.returncode == 0:
        names = [Path(name) for name in answer.stdout.split("\0") if name]
        yield from (folder / name for name in names if (folder / name).is_file() and not _any_excluded(name))
        return
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_excluded(name)]
        yield from (Path(parent) / name for name in files if not _is_excluded(name) and (Path(parent) / name).is_file())


def _strange(folder: Path) -> Iterator[Path]:
    """Pipes, sockets and devices in what would be sent: Ray would wait for them for ever."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_excluded(name)]
        for path in (Path(parent) / name for name in files if not _is_excluded(name)):
            if path.exists() and not path.is_file() and not _is_ignored(folder, path):
                yield path


def _is_ignored(folder: Path, path: Path) -> bool:
    """Whether a .gitignore names it."""
    words = ["git", "-C", str(folder), "check-ignore", "--quiet", str(path)]
    try:
        return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _any_excluded(name: Path) -> bool:
    return any(_is_excluded(part) for part in name.parts)


def _is_excluded(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDES)
