"""A whole cluster on one machine: a head, and nodes with the labels and the logical resources of real pools.

Every node is a real raylet of its own, so scheduling, placement, drains, sites and lost nodes behave as they do on
real machines; only the accelerators are numbers. All processes carry an id in their environment, and `down` ends those
with that id and no others.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from modelyard.cluster import LAPTOP_FILE
from modelyard.clusters.files import ACCELERATOR, POOL, SITE, TIER, ZONE
from modelyard.config import settings
from modelyard.errors import ConfigError, NotFoundError, StartError, WaitTimeoutError

ENV_ID = "MODELYARD_CLUSTER_ID"
"""In the environment of every process of a laptop cluster, and of what these start."""
LOOPBACK = "127.0.0.1"
NODE = "modelyard/node"
"""Label with the name that a node has here."""
ATTEMPTS = 3
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
MAX_NODES = 64
MAX_AMOUNT = 4096
"""CPUs or accelerators of a node."""
_POOL = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)=(?P<nodes>\d+)(?:x(?P<gpus>\d+))?(?::(?P<cpus>\d+))?\Z")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_MIB = 1 << 20


@dataclass(frozen=True, eq=False)
class LogicalNode:
    """One node to start."""

    name: str
    labels: dict[str, str]
    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Laptop:
    """A laptop cluster, as its file has it."""

    cluster_id: str
    address: str
    dashboard: str
    temp_dir: str
    nodes: tuple[LogicalNode, ...] = field(default=())

    @property
    def processes(self) -> list[psutil.Process]:
        """Everything of it that runs, jobs and actors included."""
        return [process for process in psutil.process_iter() if _id_of(process) == self.cluster_id]


def plan(pools: Sequence[str], sites: Sequence[str], cpus: int | None = None) -> tuple[LogicalNode, ...]:
    """The nodes of `--pool a100=2x4:8 --site north`: two nodes of 4 accelerators and 8 CPUs each, and one at a site.

    Without pools the head itself takes the work. Pure.

    Args:
        pools: `NAME=NODES`, `NAME=NODESxACCELERATORS` or `NAME=NODESxACCELERATORS:CPUS`; CPUs are those of one node.
        sites: names of edge sites, one node each.
        cpus: of the head, when it takes work.

    Raises:
        ConfigError: one cannot be read, is named twice, or there are too many nodes.
    """
    own = os.cpu_count() or 1
    zone = {ZONE: "laptop"}
    head_cpus = cpus if cpus is not None else (0 if pools else own)
    head_labels = {POOL: "head" if pools else "cpu", SITE: "laptop", TIER: "cloud", **zone}
    nodes = [LogicalNode("head", head_labels, head_cpus)]
    for text in pools:
        match = _POOL.match(text)
        if match is None:
            raise ConfigError(f"--pool {text!r} cannot be read", "write NAME=NODESxACCELERATORS, e.g. --pool a100=2x4")
        name, count, gpus = match["name"], int(match["nodes"]), int(match["gpus"] or 0)
        if any(node.labels[POOL] == name for node in nodes):
            raise ConfigError(f"--pool {name} is there twice", "name each pool once")
        if count < 1 or max(gpus, int(match["cpus"] or 0)) > MAX_AMOUNT:
            raise ConfigError(
                f"--pool {text!r} is no pool", f"give it a node at least, of at most {MAX_AMOUNT} CPUs and accelerators"
            )
        labels = {POOL: name, SITE: "laptop", TIER: "cloud", **zone}
        labels |= {ACCELERATOR: name.upper()} if gpus else {}
        each = int(match["cpus"] or max(gpus, own))
        nodes += [LogicalNode(f"{name}-{number}", labels, each, gpus) for number in range(count)]
    for site in sites:
        if not _SITE.match(site):
            raise ConfigError(f"--site {site!r} is no name", "use letters, digits, `.`, `_` and `-`")
        if any(node.labels[SITE] == site for node in nodes):
            raise ConfigError(f"--site {site} is there twice, or is the laptop's own", "name each site once")
        nodes.append(LogicalNode(f"edge-{site}", {POOL: "edge", SITE: site, TIER: "edge", ZONE: site}, own))
    if len(nodes) > MAX_NODES:
        raise ConfigError(
            f"{len(nodes)} nodes on one machine", f"ask for {MAX_NODES} or fewer; each takes about 250 MiB"
        )
    return tuple(nodes)


def up(
    nodes: Sequence[LogicalNode],
    temp_dir: Path | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
    dashboard: int = 8265,
    say: Callable[[str], None] = lambda _: None,
) -> Laptop:
    """Start the nodes, the head first, and return when all have joined. They outlive this process.

    Args:
        nodes: as `plan` makes them.
        temp_dir: Ray's folder; with Ray's own default, every Ray program on this machine finds the cluster.
        start_timeout_s: longest wait for the head, and again for the others.
        dashboard: its port; another free one is taken when it is in use.
        say: told what is being done, once nothing stands against it.

    Raises:
        ConfigError: a laptop cluster runs already.
        StartError: Ray did not start; nothing of it is left.
        WaitTimeoutError: it took too long; nothing of it is left but the nodes' output in `logs`.
    """
    with _alone():
        if (old := current()) is not None:
            raise ConfigError(
                f"a cluster runs here already, at {old.address}", "see modelyard status, or modelyard down"
            )
        say(f"starting {len(nodes)} nodes on this machine ...")
        return _up(nodes, temp_dir, start_timeout_s, dashboard)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold this home's cluster for one `up`; the lock dies with its process."""
    path = _state_file().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("a cluster is being started here already", "wait for it: modelyard status") from None
        yield


def _up(nodes: Sequence[LogicalNode], temp_dir: Path | None, start_timeout_s: float, dashboard: int) -> Laptop:
    port, dashboard = _free_port(), _free_port(dashboard)
    folder = str(temp_dir.expanduser().absolute()) if temp_dir else _default_temp_dir()
    laptop = Laptop(uuid.uuid4().hex, f"{LOOPBACK}:{port}", f"http://{LOOPBACK}:{dashboard}", folder, tuple(nodes))
    environment = _environment(laptop)
    part = _state_file().with_suffix(".part")
    part.write_text(json.dumps(asdict(laptop), indent=2))
    part.rename(_state_file())
    store_bytes = max(128 * _MIB, int(psutil.virtual_memory().available * 0.2 / len(nodes)))
    for node in nodes:
        _log_file(node.name).unlink(missing_ok=True)
    try:
        head = ["--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-host={LOOPBACK}"]
        head += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        start = functools.partial(_start, environment=environment, store_bytes=store_bytes)
        _join(laptop, {nodes[0]: lambda: start(nodes[0], head)}, start_timeout_s)
        join = f"--address={laptop.address}"
        folders = _node_folders(laptop)  # in one folder, two that start at once would take the same socket
        starts = {
            node: functools.partial(start, node, [join, f"--temp-dir={own}"])
            for node, own in zip(nodes[1:], folders, strict=True)
        }
        _join(laptop, starts, start_timeout_s)
    except BaseException:
        down(laptop)
        raise
    return laptop


def current() -> Laptop | None:
    """The laptop cluster of this user's `MODELYARD_HOME`, if it runs.

    Raises:
        ConfigError: the file that says which one it is is damaged, so that a running one would be lost.
    """
    try:
        stored = json.loads(_state_file().read_text())
        nodes = tuple(LogicalNode(**node) for node in stored.pop("nodes"))
        laptop = Laptop(**stored, nodes=nodes)
        if not all(isinstance(value, str) for value in stored.values()):
            raise TypeError("text is expected")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = [str(process.pid) for process in psutil.process_iter() if _id_of(process) and _is_supervisor(process)]
        todo = f"end its nodes (kill {' '.join(found)}: nodes of this user's laptop clusters), " if found else ""
        raise ConfigError(f"{_state_file()} is damaged: {error!r}", f"{todo}then remove the file") from error
    return laptop if laptop.processes else None


def job_log(laptop: Laptop, job_id: str) -> str | None:
    """What a job's script has printed on another node than the head: Ray's agent there looks in the head's folder."""
    for folder in _node_folders(laptop):
        for path in folder.glob(f"session_*/logs/job-driver-{job_id}.log"):
            return path.read_text(errors="replace")
    return None


def required() -> Laptop:
    """The laptop cluster.

    Raises:
        NotFoundError: none runs.
    """
    if (laptop := current()) is None:
        raise NotFoundError("no laptop cluster runs here", "start one: modelyard up")
    return laptop


def down(laptop: Laptop) -> int:
    """End exactly its processes: politely, then for good. Returns how many there were."""
    found = {process.pid: process for process in laptop.processes}
    supervisors = [process for process in found.values() if _is_supervisor(process)]
    for process in supervisors or found.values():
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := laptop.processes) and time.monotonic() < deadline:
        found |= {process.pid: process for process in left}
        psutil.wait_procs(left, timeout=0.5)
        if not any(_is_supervisor(process) for process in left):
            break
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := laptop.processes:
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            raise WaitTimeoutError(
                f"the processes {pids} to end after SIGKILL", STOP_TIMEOUT_S, "laptop.STOP_TIMEOUT_S"
            )
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=2.0)
    _state_file().unlink(missing_ok=True)
    _clear(laptop)
    return len(found)


def look(laptop: Laptop) -> list[dict[str, Any]]:
    """Its nodes now: name, labels, resources, whether alive."""
    return _nodes(laptop)


def authenticate(*, make: bool = False) -> None:
    """Let this process use Ray's token of this user, unless the environment says otherwise.

    Args:
        make: make the token when there is none.
    """
    if make and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        _make_token()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if _token_file().exists() else "disabled")


def _start(
    node: LogicalNode, role: Sequence[str], environment: dict[str, str], store_bytes: int
) -> subprocess.Popen[bytes]:
    labels = ",".join(f"{key}={value}" for key, value in {**node.labels, NODE: node.name}.items())
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={LOOPBACK}", "--block"]
    command += [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}", f"--labels={labels}"]
    command += [f"--object-store-memory={store_bytes}", "--disable-usage-stats"]
    command.append(f"--dashboard-agent-listen-port={_free_port()}")  # Ray's own is the same for every node
    with _log_file(node.name).open("ab") as log:  # one that is started again must not hide why
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _join(
    laptop: Laptop, starts: Mapping[LogicalNode, Callable[[], subprocess.Popen[bytes]]], start_timeout_s: float
) -> None:
    """Start nodes together and wait until all have joined; one that ends before that is started again."""
    processes = {node.name: start() for node, start in starts.items()}
    failures = Counter[str]()
    deadline = time.monotonic() + start_timeout_s
    while missing := set(processes) - {found["name"] for found in _nodes(laptop) if found["alive"]}:
        for node, start in starts.items():
            if node.name in missing and processes[node.name].poll() is not None:
                failures[node.name] += 1
                if failures[node.name] == ATTEMPTS:
                    problem = f"Ray did not start node {node.name}: {_last_words(node)}"
                    raise StartError(problem, f"its output is in {_log_file(node.name)}")
                processes[node.name] = start()
        if time.monotonic() > deadline:
            names = ", ".join(sorted(missing))
            where = f"output in {_log_file(min(missing))}"
            failed = f"{failures.total()} starts failed, " if failures else ""
            what = f"{names} of the laptop cluster ({failed}{where})"
            raise WaitTimeoutError(what, start_timeout_s, "--start-timeout-s")
        time.sleep(0.2)


def _environment(laptop: Laptop) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **kept,
        ENV_ID: laptop.cluster_id,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),  # jobs call `python`
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes on one Mac
        "RAY_enable_worker_prestart": "0",  # a process per CPU of every logical node would crowd the machine
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _make_token() -> None:
    path = _token_file()
    if path.exists() or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))


def _nodes(laptop: Laptop) -> list[dict[str, Any]]:
    host, _, port = laptop.address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return []
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    try:
        found = GcsClient(address=laptop.address).get_all_node_info(timeout=5)
    except (RayError, RuntimeError, ConnectionError):
        return []  # it listens, and is not ready yet
    return [
        {
            "name": node.labels.get(NODE, "?"),
            "alive": node.state == 0,
            "labels": dict(node.labels),
            "resources": dict(node.resources_total),
        }
        for node in found.values()
    ]


def _last_words(node: LogicalNode) -> str:
    path = _log_file(node.name)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    errors = [line for line in lines if "Error" in line or "Exception" in line] or ["it ended at once"]
    return errors[-1].strip()[:300]


def _id_of(process: psutil.Process) -> str | None:
    try:
        found: str | None = process.environ().get(ENV_ID)
    except (psutil.Error, OSError):
        return None
    return found


def _is_supervisor(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
        return "--block" in words and "ray.scripts.scripts" in words and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return  # it has ended meanwhile


def _clear(laptop: Laptop) -> None:
    """Remove what Ray left: the note of the address, and the nodes' folders; the head's logs stay."""
    path = Path(laptop.temp_dir) / "ray_current_cluster"
    try:
        if path.read_text().strip().rpartition(":")[2] == laptop.address.rpartition(":")[2]:
            path.unlink()
    except OSError:
        pass  # the head never came up
    for folder in _node_folders(laptop):
        shutil.rmtree(folder, ignore_errors=True)


def _node_folders(laptop: Laptop) -> list[Path]:
    """Ray's folder of each node but the head. Short: socket paths have at most 107 characters."""
    return [Path(laptop.temp_dir) / f"{laptop.cluster_id[:4]}{number}" for number in range(1, len(laptop.nodes))]


def _default_temp_dir() -> str:
    return str(Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray")


def _free_port(wanted: int = 0) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _state_file() -> Path:
    return settings().home / LAPTOP_FILE


def _log_file(name: str) -> Path:
    folder = settings().home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
