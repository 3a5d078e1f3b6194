"""`modelyard doctor`: look at this machine, say what is wrong, and what to do. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from modelyard.cli.doctor_checks import CORE, Endpoint, Facts, Finding, Requirement, checks
from modelyard.config import settings

CONNECT_TIMEOUT_S = 2.0
IMPORT_TIMEOUT_S = 120.0
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_SECRET = ("PASSPHRASE", "PASSWORD", "KEY")
"""Ends of the names of variables whose values are not shown."""
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433, "ray": 10001}

_TORCH = """
import json, torch
from pathlib import Path
facts = {"threads": torch.get_num_threads(), "accelerators": [], "backend": "cpu", "bf16": False}
if torch.cuda.is_available():
    facts["backend"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    facts["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
elif hasattr(torch, "xpu") and torch.xpu.is_available():
    facts["backend"] = "XPU"
    facts["accelerators"] = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    facts["bf16"] = True
elif torch.backends.mps.is_available():
    facts.update(backend="MPS", accelerators=["Apple GPU"], bf16=True)
else:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().split() if cpu.exists() else []
    facts["bf16"] = "amx_bf16" in flags or "bf16" in flags  # other x86 CPUs are slower than in fp32
print("FACTS" + json.dumps(facts))
"""
_DEEPSPEED = "import deepspeed; print('FACTS{}')"
_S3 = "from pyarrow.fs import S3FileSystem; print('FACTS{}')"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--cluster", is_flag=True, help="Look for what a stranger could use of the cluster here instead.")
@click.option("--address", help="With --cluster: its dashboard; by default that of this machine.")
@click.pass_context
def doctor(context: click.Context, as_json: bool, cluster: bool, address: str | None) -> None:
    """Check this machine and say what to do. Exit code 1 when something fails."""
    findings = _cluster_findings(address) if cluster else checks(gather())
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        report = {"ok": not failed, "findings": [finding._asdict() for finding in findings]}
        click.echo(json.dumps(report, indent=2))
    else:
        _print(findings)
    context.exit(1 if failed else 0)


def _cluster_findings(address: str | None) -> list[Finding]:
    from modelyard.cli import doctor_cluster
    from modelyard.clusters import laptop

    here, found = laptop.current(), _ray_cluster()
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    url = named or (here.dashboard if here else "http://127.0.0.1:8265")
    gcs = here.address if here else found.address if found and found.reachable and "://" not in found.address else ""
    return doctor_cluster.findings(
        doctor_cluster.gather(url, gcs, is_one_machine=here is not None, is_named=named is not None)
    )


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        status = click.style(f"{finding.status:4}", fg=_COLORS[finding.status])
        click.echo(f"{status}  {finding.name:{width}}  {finding.value}")
        if finding.todo:
            click.echo(f"      {'':{width}}  -> {finding.todo}")
    count = {status: sum(finding.status == status for finding in findings) for status in _COLORS}
    click.echo(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed")


def gather() -> Facts:
    """Find out what `checks` needs. Missing or broken packages are facts, not errors; takes some seconds."""
    with ThreadPoolExecutor() as pool:
        torch, deepspeed, s3 = (pool.submit(_probe, code) for code in (_TORCH, _DEEPSPEED, _S3))
        cluster = pool.submit(_ray_cluster)
        tracking_uri = settings().tracking_uri
        tracking = pool.submit(_reach, tracking_uri)
        requirements = _requirements()
        home = settings().home
        existing = next(folder for folder in (home, *home.parents) if folder.exists())
        return Facts(
            python=sys.version_info[:3],
            requirements=requirements,
            installed=_installed({*CORE, *(requirement.package for requirement in requirements)}),
            torch=torch.result(),
            deepspeed_error=deepspeed.result().get("error", ""),
            compiler=shutil.which("g++") or shutil.which("c++") or "",
            ninja=shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
            or "",
            ray_cluster=cluster.result(),
            home=str(home),
            home_free_gib=shutil.disk_usage(existing).free / 2**30,
            home_writable=existing.is_dir() and os.access(existing, os.W_OK),
            shared_memory_gib=shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else None,
            memory_gib=_memory_gib(),
            cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            open_files=_open_files(),
            s3_error=s3.result().get("error", ""),
            tracking=Endpoint(_masked(tracking_uri), tracking.result()),
            variables={
                name: "set" if name.endswith(_SECRET) else _masked(text)
                for name, text in os.environ.items()
                if name.startswith("MODELYARD_")
            },
        )


def _probe(code: str) -> dict[str, Any]:
    """Run code in an interpreter of its own, so that a package that crashes on import is only a fact."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"cannot be imported: {error}"}
    if answer.returncode == 0 and "FACTS" in answer.stdout:
        facts: dict[str, Any] = json.loads(answer.stdout.rpartition("FACTS")[2])
        return facts
    lines = answer.stderr.strip().splitlines()
    return {"error": lines[-1] if lines else f"the interpreter ended with code {answer.returncode}"}


def _requirements() -> list[Requirement]:
    """The package's own pins, from its metadata: the numbers stand in pyproject.toml alone."""
    from packaging.requirements import Requirement as Parsed

    try:
        lines = importlib.metadata.requires("modelyard") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        parsed = Parsed(line)
        extra = re.search(r"extra == ['\"]([^'\"]+)", str(parsed.marker or ""))
        found.append(Requirement(parsed.name, str(parsed.specifier), extra.group(1) if extra else ""))
    return [requirement for requirement in found if requirement.package != "modelyard"]


def _installed(names: set[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _ray_cluster() -> Endpoint | None:
    """The cluster a job started here would join: `RAY_ADDRESS`, else the one on this machine that answers."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address not in ("auto", "local"):
        return Endpoint(address, _reach(address if "://" in address else f"gcs://{address}"))
    current = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        found = current.read_text().strip()
    except OSError:
        found = ""
    if found and _reach(f"gcs://{found}"):
        return Endpoint(found, True)  # else it is the file of a cluster that is gone
    return Endpoint("auto", False) if address == "auto" else None


def _reach(uri: str) -> bool:
    """Whether something accepts connections at a URI; for files, whether they can be written."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme in ("sqlite", "file", ""):
        path = Path(uri.partition(":///")[2] if scheme == "sqlite" else parts.path)
        existing = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
        return os.access(existing, os.W_OK)
    try:
        address = (parts.hostname or "localhost", parts.port or _PORTS.get(scheme, 6379))
        with socket.create_connection(address, timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _masked(uri: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)
