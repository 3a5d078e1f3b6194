"""`modelyard doctor`: what is concluded from which facts, and that gathering them never fails."""

from __future__ import annotations

import json
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelyard.cli import doctor as doctor_module
from modelyard.cli.doctor import doctor, gather
from modelyard.cli.doctor_checks import CORE, VARIABLES, Endpoint, Facts, Finding, Requirement, checks
from modelyard.cli.main import modelyard

PINS = {"torch": ">=2.13,<2.14", "ray": "==2.60.0", "deepspeed": "==0.19.8"}
WELL = Facts(
    python=(3, 11, 7),
    requirements=[
        *(Requirement(name, PINS.get(name, "")) for name in CORE),
        Requirement("peft", ">=0.21", "lora"),
    ],
    installed={name: "1.0" for name in CORE}
    | {"torch": "2.13.0+cpu", "ray": "2.60.0", "deepspeed": "0.19.8", "peft": "0.21"},
    torch={"threads": 2, "accelerators": [], "backend": "cpu", "bf16": True},
    compiler="/usr/bin/g++",
    ninja="/usr/bin/ninja",
    home="/home/x",
    home_free_gib=50.0,
    shared_memory_gib=8.0,
    memory_gib=16.0,
    cpus=2,
    open_files=65536,
    tracking=Endpoint("sqlite:///x", True),
)


def without(package: str) -> dict[str, str]:
    return {name: version for name, version in WELL.installed.items() if name != package}


def finding(name: str, **changes: Any) -> Finding:
    """The finding of that name when `changes` are made to a healthy machine."""
    return next(found for found in checks(replace(WELL, **changes)) if found.name == name)


def test_a_healthy_machine_has_nothing_to_mend() -> None:
    assert {found.status for found in checks(WELL)} == {"ok"}
    assert [found for found in checks(WELL) if found.todo] == []


@pytest.mark.parametrize(
    ("name", "changes", "status", "value", "todo"),
    [
        ("Python", {"python": (3, 10, 2)}, "fail", "3.10.2", "install Python 3.11"),
        (
            "torch",
            {"installed": without("torch")},
            "fail",
            "not installed",
            "pip install 'torch>=2.13,<2.14'",
        ),
        (
            "torch",
            {"installed": {**WELL.installed, "torch": "2.14.0"}},
            "fail",
            "2.14.0, needs",
            "pip install",
        ),
        (
            "ray",
            {"installed": {**WELL.installed, "ray": "2.61.0"}},
            "fail",
            "2.61.0, needs ==2.60.0",
            "'ray==2.60.0'",
        ),
        ("torch import", {"torch": {"error": "no libcudart"}}, "fail", "no libcudart", "reinstall torch"),
        ("CPU threads", {"torch": {"threads": 64}}, "warn", "64 on 2 CPUs", "OMP_NUM_THREADS=2"),
        ("bf16", {"torch": {"threads": 2}}, "ok", "not fast here", "fp32"),
        ("deepspeed import", {"deepspeed_error": "no op"}, "fail", "no op", "reinstall deepspeed"),
        ("compiler", {"ninja": ""}, "warn", "no ninja", "pip install ninja"),
        ("compiler", {"ninja": "", "compiler": ""}, "warn", "no g++ and no ninja", "apt install g++"),
        (
            "Ray cluster",
            {"ray_cluster": Endpoint("10.0.0.1:6379", False)},
            "fail",
            "does not answer",
            "RAY_ADDRESS",
        ),
        ("Ray cluster", {"ray_cluster": Endpoint("10.0.0.1:6379", True)}, "ok", "10.0.0.1:6379", ""),
        ("/dev/shm", {"shared_memory_gib": 0.0625}, "warn", "0.1 GiB", "--shm-size=6g"),
        ("open files", {"open_files": 1024}, "warn", "1024", "ulimit -n 65536"),
        ("disk", {"home_free_gib": 3.0}, "warn", "3.0 GiB free", "free some"),
        ("disk", {"home_free_gib": 0.01}, "fail", "0.0 GiB free", "free some"),
        ("disk", {"home_writable": False}, "fail", "cannot be written", "MODELYARD_HOME"),
        ("S3", {"s3_error": "no S3FileSystem"}, "warn", "no S3FileSystem", "reinstall pyarrow"),
        (
            "tracking",
            {"tracking": Endpoint("http://m:5000", False)},
            "fail",
            "cannot be reached",
            "MLflow server",
        ),
        ("extra lora", {"installed": without("peft")}, "ok", "not installed (peft)", "'modelyard[lora]'"),
        ("MODELYARD_HOEM", {"variables": {"MODELYARD_HOEM": "x"}}, "warn", "no effect", "'MODELYARD_HOME'"),
        ("MODELYARD_HOME", {"variables": {"MODELYARD_HOME": "/x"}}, "ok", "/x", ""),
    ],
)
def test_a_fact_out_of_order_is_judged_and_comes_with_what_to_do(
    name: str, changes: dict[str, Any], status: str, value: str, todo: str
) -> None:
    found = finding(name, **changes)
    assert found.status == status
    assert value in found.value
    assert todo in found.todo.replace("--force-reinstall", "reinstall")


def test_accelerators_of_one_kind_are_counted() -> None:
    torch = {"accelerators": ["A100", "A100", "L4"], "backend": "CUDA 13.0", "bf16": True}
    assert finding("accelerators", torch=torch).value == "CUDA 13.0: 2 x A100, 1 x L4"


def test_the_strangest_machine_is_judged_too() -> None:
    findings = checks(Facts())
    assert {found.name for found in findings if found.status == "fail"} == set(CORE)


def test_every_variable_that_the_code_reads_is_known_and_the_other_way_round() -> None:
    package = Path(doctor_module.__file__).parents[1]
    files = [path for path in package.rglob("*.py") if path.name != "doctor_checks.py"]
    read = {word for path in files for word in re.findall(r"[\"'](MODELYARD_[A-Z0-9_]*[A-Z])[\"']", path.read_text())}
    assert read == set(VARIABLES)


def test_gathering_finds_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_TRACKING_URI", "postgresql://me:secret@127.0.0.1:1/x")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for name in ("MODELYARD_API_KEY", "MODELYARD_BACKUP_PASSPHRASE", "MODELYARD_REDIS_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    facts = gather()
    assert facts.python == sys.version_info[:3]
    assert Requirement("ray", "==2.60.0") in facts.requirements
    assert facts.torch["threads"] >= 1
    assert (facts.deepspeed_error, facts.s3_error) == ("", "")
    assert facts.ray_cluster == Endpoint("127.0.0.1:1", False)
    assert facts.tracking == Endpoint("postgresql://me:***@127.0.0.1:1/x", False)
    assert "secret" not in repr(facts)


def test_a_package_that_is_missing_or_crashes_is_a_fact_and_not_an_error() -> None:
    assert doctor_module._probe("import no_such_package") == {
        "error": "ModuleNotFoundError: No module named 'no_such_package'"
    }
    assert "code -11" in doctor_module._probe("import os; os.kill(os.getpid(), 11)")["error"]
    assert doctor_module._installed({"no-such-package"}) == {}


def test_a_listening_port_is_reachable_and_a_closed_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor_module._reach(f"http://127.0.0.1:{port}")
    assert not doctor_module._reach(f"http://127.0.0.1:{port}")


def test_the_exit_code_and_the_json_say_whether_something_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for facts, code in (
        (WELL, 0),
        (replace(WELL, open_files=10), 0),
        (replace(WELL, home_writable=False), 1),
    ):
        monkeypatch.setattr(doctor_module, "gather", lambda facts=facts: facts)
        plain, as_json = (CliRunner().invoke(doctor, args) for args in ([], ["--json"]))
        assert (plain.exit_code, as_json.exit_code) == (code, code)
        report = json.loads(as_json.output)
        assert report["ok"] is (code == 0)
        assert len(report["findings"]) == len(checks(facts))
        assert all(set(entry) == {"name", "status", "value", "todo"} for entry in report["findings"])


def test_the_report_shows_each_finding_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "gather", lambda: replace(WELL, open_files=1024))
    lines = CliRunner().invoke(modelyard, ["doctor"]).output.splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith("warn  open files"))
    assert lines[index + 1].strip() == "-> a node of many workers needs more: ulimit -n 65536"
    assert lines[-1].endswith("1 to look at, 0 failed")
