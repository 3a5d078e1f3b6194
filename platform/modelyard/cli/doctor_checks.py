"""What `modelyard doctor` concludes from the facts of a machine. Pure: no import, no file, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from packaging.specifiers import SpecifierSet

from modelyard.errors import nearest

MIN_PYTHON = (3, 11)
MIN_FREE_GIB = 10.0
MIN_OPEN_FILES = 4096
OBJECT_STORE_SHARE = 0.3
"""Ray's object store takes this share of the memory unless told otherwise."""
MAX_OBJECT_STORE_GIB = 186.0
CORE = ("torch", "ray", "deepspeed", "transformers", "mlflow", "pyarrow", "pydantic")
HIDDEN_EXTRAS = ("dev", "test")
VARIABLES = (
    "MODELYARD_API_KEY",
    "MODELYARD_BACKUP_PASSPHRASE",
    "MODELYARD_CLUSTER_ID",
    "MODELYARD_DEBUG",
    "MODELYARD_GATEWAY_DB",
    "MODELYARD_HOME",
    "MODELYARD_REDIS_PASSWORD",
    "MODELYARD_S3_TIMEOUT_S",
    "MODELYARD_STORE",
    "MODELYARD_TRACKING_URI",
)
"""Every environment variable that Modelyard reads."""


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    todo: str = ""
    """What to do about it; empty when nothing need be done."""


class Requirement(NamedTuple):
    """One line of the package's own metadata."""

    package: str
    versions: str
    """A version specifier such as `>=2.13,<2.14`; empty allows all."""
    extra: str = ""
    """The optional part it belongs to; empty for what is always needed."""


class Endpoint(NamedTuple):
    """A place this machine was asked to reach."""

    address: str
    reachable: bool


@dataclass(frozen=True)
class Facts:
    """What `gather` found; None, or an empty value, where something could not be found out."""

    python: tuple[int, int, int] = (3, 11, 0)
    requirements: Sequence[Requirement] = ()
    installed: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that are there."""
    torch: Mapping[str, Any] = field(default_factory=dict)
    """`accelerators` (names), `backend`, `threads`, `bf16`; or `error` when torch is there but broken."""
    deepspeed_error: str = ""
    compiler: str = ""
    """Path of g++."""
    ninja: str = ""
    ray_cluster: Endpoint | None = None
    home: str = ""
    home_free_gib: float | None = None
    home_writable: bool = True
    shared_memory_gib: float | None = None
    memory_gib: float | None = None
    cpus: int = 1
    open_files: int | None = None
    s3_error: str = ""
    tracking: Endpoint | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    """The `MODELYARD_*` variables in force, passwords masked."""


def checks(facts: Facts) -> list[Finding]:
    """Judge the facts; the worst can be `fail`: Modelyard will not work here until it is mended."""
    return [
        _python(facts),
        *_packages(facts),
        *_torch(facts),
        *_deepspeed(facts),
        *_ray(facts),
        *_machine(facts),
        *_storage(facts),
        *_extras(facts),
        *_variables(facts),
    ]


def _python(facts: Facts) -> Finding:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] >= MIN_PYTHON:
        return Finding("Python", "ok", version)
    return Finding("Python", "fail", version, "install Python 3.11 or newer and make the environment anew")


def _packages(facts: Facts) -> Iterator[Finding]:
    wanted = {requirement.package: requirement for requirement in facts.requirements if not requirement.extra}
    for name in CORE:
        versions = wanted[name].versions if name in wanted else ""
        found = facts.installed.get(name)
        if found is None:
            yield Finding(name, "fail", "not installed", f"pip install '{name}{versions}'")
        elif not SpecifierSet(versions).contains(found, prereleases=True):
            yield Finding(name, "fail", f"{found}, needs {versions}", f"pip install '{name}{versions}'")
        else:
            yield Finding(name, "ok", found)


def _torch(facts: Facts) -> Iterator[Finding]:
    if "torch" not in facts.installed:
        return
    if error := facts.torch.get("error"):
        yield Finding("torch import", "fail", str(error), "reinstall torch: pip install --force-reinstall torch")
        return
    names, threads = list(facts.torch.get("accelerators", ())), facts.torch.get("threads", 0)
    if names:
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield Finding("accelerators", "ok", f"{facts.torch.get('backend')}: {kinds}")
    else:
        yield Finding("accelerators", "ok", f"none; CPU with {threads} threads")
        if threads > facts.cpus:
            yield Finding(
                "CPU threads",
                "warn",
                f"{threads} on {facts.cpus} CPUs",
                f"export OMP_NUM_THREADS={facts.cpus}",
            )
    if facts.torch.get("bf16"):
        yield Finding("bf16", "ok", "fast here")
    else:
        yield Finding("bf16", "ok", "not fast here", "train in fp32 on this machine")


def _deepspeed(facts: Facts) -> Iterator[Finding]:
    if "deepspeed" not in facts.installed:
        return
    if facts.deepspeed_error:
        yield Finding("deepspeed import", "fail", facts.deepspeed_error, "pip install --force-reinstall deepspeed")
    missing = [name for name, path in (("g++", facts.compiler), ("ninja", facts.ninja)) if not path]
    if missing:
        todo = "only for DeepSpeed's compiled ops (CPU offload): apt install g++; pip install ninja"
        yield Finding("compiler", "warn", f"no {' and no '.join(missing)}", todo)
    else:
        yield Finding("compiler", "ok", facts.compiler)


def _ray(facts: Facts) -> Iterator[Finding]:
    cluster = facts.ray_cluster
    if cluster is None:
        yield Finding("Ray cluster", "ok", "none running; jobs start a local one")
    elif cluster.reachable:
        yield Finding("Ray cluster", "ok", cluster.address)
    else:
        todo = "start it (ray up, ray start), or unset RAY_ADDRESS to start a local one"
        yield Finding("Ray cluster", "fail", f"{cluster.address} does not answer", todo)


def _machine(facts: Facts) -> Iterator[Finding]:
    if facts.shared_memory_gib is not None:
        need = min(OBJECT_STORE_SHARE * (facts.memory_gib or 0.0), MAX_OBJECT_STORE_GIB)
        value, enough = f"{facts.shared_memory_gib:.1f} GiB", facts.shared_memory_gib >= need
        todo = f"Ray's object store wants {need:.1f} GiB, else it is on disk: --shm-size={need + 1:.0f}g in docker"
        yield Finding("/dev/shm", "ok", value) if enough else Finding("/dev/shm", "warn", value, todo)
    if facts.open_files is not None:
        value, enough = str(facts.open_files), facts.open_files >= MIN_OPEN_FILES
        todo = "a node of many workers needs more: ulimit -n 65536"
        yield Finding("open files", "ok", value) if enough else Finding("open files", "warn", value, todo)


def _storage(facts: Facts) -> Iterator[Finding]:
    free = facts.home_free_gib
    if not facts.home_writable:
        yield Finding("disk", "fail", f"{facts.home} cannot be written", "set MODELYARD_HOME to a folder you own")
    elif free is not None:
        low = free < MIN_FREE_GIB
        todo = "datasets and checkpoints need room: free some, or set MODELYARD_HOME" if low else ""
        status: Literal["ok", "warn", "fail"] = "fail" if free < 0.1 else "warn" if low else "ok"
        yield Finding("disk", status, f"{free:.1f} GiB free at {facts.home}", todo)
    if "pyarrow" in facts.installed:
        todo = "install a pyarrow wheel with S3 from PyPI: pip install --force-reinstall pyarrow"
        s3 = Finding("S3", "warn", facts.s3_error, todo) if facts.s3_error else Finding("S3", "ok", "pyarrow can")
        yield s3
    if facts.tracking is not None:
        address, reachable = facts.tracking
        todo = "start the MLflow server, or set MODELYARD_TRACKING_URI to one that answers"
        if reachable:
            yield Finding("tracking", "ok", address)
        else:
            yield Finding("tracking", "fail", f"{address} cannot be reached", todo)


def _extras(facts: Facts) -> Iterator[Finding]:
    extras = {requirement.extra for requirement in facts.requirements} - {"", *HIDDEN_EXTRAS}
    for extra in sorted(extras):
        missing = [r.package for r in facts.requirements if r.extra == extra and r.package not in facts.installed]
        if missing:
            todo = f"only if you want it: pip install 'modelyard[{extra}]'"
            yield Finding(f"extra {extra}", "ok", f"not installed ({', '.join(missing)})", todo)
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _variables(facts: Facts) -> Iterator[Finding]:
    for name, value in sorted(facts.variables.items()):
        if name in VARIABLES:
            yield Finding(name, "ok", value)
        else:
            yield Finding(name, "warn", "no such variable, so it has no effect", nearest(name, VARIABLES))
