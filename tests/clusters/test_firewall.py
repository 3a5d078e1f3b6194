"""The rules that close the ports of Ray to strangers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from modelyard.cli.main import modelyard
from modelyard.clusters import firewall
from modelyard.errors import AccessError, ConfigError, NotFoundError, StartError

ROOT = Path(__file__).parents[2]
NFT = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def test_only_the_machines_of_the_file_reach_the_ports_of_ray() -> None:
    answer = CliRunner().invoke(
        modelyard, ["cluster", "firewall", str(ROOT / "clusters" / "local.yaml"), "--open", "8000"]
    )
    assert answer.exit_code == 0, answer.output
    lines = [line.strip() for line in answer.output.splitlines()]
    assert "ip saddr { 192.168.1.10, 192.168.1.11, 192.168.1.12, 192.168.1.13 } accept" in lines
    assert lines.index("tcp dport 8000 accept") < next(n for n, line in enumerate(lines) if line.endswith("} drop"))
    assert not any(line.endswith("drop") and " 22," in line for line in lines)


@pytest.mark.skipif(NFT is None or os.geteuid() != 0, reason="needs nft and root")
def test_nft_understands_the_rules() -> None:
    text = firewall.rules(["10.0.0.1", "fd00::1"], [8000])
    checked = subprocess.run(
        ["unshare", "--net", str(NFT), "-c", "-f", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_a_name_instead_of_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'node-1' is no IP address.*\n  -> list the machines by IP address"):
        firewall.rules(["node-1"])


def test_a_cloud_file_is_left_to_its_security_group() -> None:
    answer = CliRunner().invoke(modelyard, ["cluster", "firewall", str(ROOT / "cluster.yaml")])
    assert isinstance(answer.exception, ConfigError)
    assert "security group" in str(answer.exception)


@pytest.mark.parametrize(
    ("program", "kind", "problem"),
    [
        (None, NotFoundError, "has no nft"),
        ("echo 'sudo: a password is required' >&2; exit 1", AccessError, "only root may set the firewall"),
        ("echo 'Error: syntax error' >&2; exit 1", StartError, "nft refused the rules"),
    ],
)
def test_what_stands_in_the_way_is_said(
    program: str | None, kind: type[Exception], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None
    if program is not None:
        found = str(tmp_path / "nft")
        Path(found).write_text(f"#!/bin/sh\n{program}\n")
        Path(found).chmod(0o755)
    monkeypatch.setattr(firewall.shutil, "which", lambda *_, **__: found)
    monkeypatch.setattr(firewall.os, "geteuid", lambda: 0)
    with pytest.raises(kind, match=problem):
        firewall.apply(firewall.rules(["10.0.0.1"]))


def shipped(*options: str, script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """`modelyard cluster firewall` on the shipped file, with a program in place of nft."""
    program = folder / "nft"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(firewall.shutil, "which", lambda *_, **__: str(program))
    monkeypatch.setattr(firewall.os, "geteuid", lambda: 0)
    return CliRunner().invoke(modelyard, ["cluster", "firewall", str(ROOT / "clusters" / "local.yaml"), *options])


NOT_ROOT = "echo 'Operation not permitted' >&2; exit 1"


def test_without_root_a_set_up_goes_on_and_says_that_ports_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = shipped("--apply-if-allowed", script=NOT_ROOT, folder=tmp_path, monkeypatch=monkeypatch)
    assert answer.exit_code == 0
    assert "the ports of Ray stay open: only root may set the firewall" in answer.output
    refused = shipped("--apply", script=NOT_ROOT, folder=tmp_path, monkeypatch=monkeypatch)
    assert isinstance(refused.exception, AccessError)


def test_rules_that_cannot_be_loaded_for_another_reason_end_the_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "echo 'Error: syntax error' >&2; exit 1"
    answer = shipped("--apply-if-allowed", script=failing, folder=tmp_path, monkeypatch=monkeypatch)
    assert isinstance(answer.exception, StartError)
    monkeypatch.setattr(firewall, "NFT_TIMEOUT_S", 0.2)
    answer = shipped("--apply-if-allowed", script="exec sleep 60", folder=tmp_path, monkeypatch=monkeypatch)
    assert isinstance(answer.exception, StartError)
    assert "NFT_TIMEOUT_S=0.2" in str(answer.exception)


def test_the_shipped_set_up_hides_no_failure_of_the_firewall_or_the_flags() -> None:
    data = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    line = next(each for each in data["setup_commands"] if "cluster firewall" in each)
    assert "||" not in line
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        script = data[name][-1].replace(
            ". ~/.modelyard/cluster/node.env", "modelyard() { return 3; }; ray() { return 0; }"
        )
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert ran.returncode == 3, (name, ran.stderr)
