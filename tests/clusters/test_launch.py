"""What stops `modelyard up FILE` before anything is started on a machine."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import yaml

from modelyard.clusters import certs, files, launch
from modelyard.clusters.authority import CA_DAYS
from modelyard.errors import AccessError, ConfigError, NotFoundError, StartError, UnavailableError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def local() -> files.ClusterFile:
    return files.read(ROOT / "clusters" / "local.yaml")


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when Ray's launcher would be called after all."""
    monkeypatch.setattr(launch, "_launcher", lambda *_: pytest.fail("the launcher was called"))


def test_a_manifest_is_for_kubectl(no_launcher: None) -> None:
    file = files.read(ROOT / "deploy" / "kuberay" / "raycluster.yaml")
    with pytest.raises(ConfigError, match=r"is a KubeRay manifest\n  -> kubectl apply -f"):
        launch.up(file, print)
    with pytest.raises(ConfigError, match=r"is a KubeRay manifest\n  -> kubectl delete -f"):
        launch.down(file, print)


def test_without_certificates_nothing_is_started(local: files.ClusterFile, no_launcher: None) -> None:
    with pytest.raises(NotFoundError, match=r"no certificates in .*\n  -> modelyard certs create"):
        launch.up(local, print)


def test_with_an_expired_authority_nothing_is_started(
    local: files.ClusterFile, no_launcher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs.create(certs.default_folder())
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=CA_DAYS + 1)
    monkeypatch.setattr("modelyard.clusters.authority.now", lambda: later)
    with pytest.raises(ConfigError, match="has expired\n  -> modelyard certs rotate"):
        launch.up(local, print)


def test_a_wrong_file_is_not_started(tmp_path: Path, no_launcher: None) -> None:
    data = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    del data["metadata"]["hosts"]["192.168.1.12"]["pool"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="the label modelyard/pool is missing"):
        launch.up(files.read(tmp_path / "bad.yaml"), print)


def test_a_machine_with_another_ray_is_named(
    tmp_path: Path, local: files.ClusterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"192.168.1.12": "2.9.0\n"}
    monkeypatch.setattr(launch, "run_on", lambda file, address, command: answers.get(address, ""))
    launch.greet(local)  # its set-up commands install the right one
    data = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({**data, "setup_commands": []}))
    with pytest.raises(ConfigError, match=r"but 192.168.1.12 has 2.9.0\n  -> on each of them: pip install ray=="):
        launch.greet(files.read(tmp_path / "bare.yaml"))


def test_down_ends_what_keeps_the_head_before_the_head(
    local: files.ClusterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(launch, "run_on", lambda _, address, command: done.append(f"{address}: {command}"))
    monkeypatch.setattr(launch, "_launcher", lambda _, command, **__: done.append(f"ray {command}"))
    launch.down(local, lambda _: None)
    assert done[0] == f"192.168.1.10: {launch.RELEASE}"
    assert done[1] == "ray down"
    assert sorted(done[2:]) == [f"192.168.1.{number}: {launch.STOP}" for number in range(10, 14)]


def test_down_goes_on_when_the_head_does_not_answer(local: files.ClusterFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_on(_: files.ClusterFile, address: str, command: str) -> str:
        if command == launch.RELEASE:
            raise UnavailableError(f"{address} cannot be reached by ssh", "")
        return ""

    done, said = [], []
    monkeypatch.setattr(launch, "run_on", run_on)
    monkeypatch.setattr(launch, "_launcher", lambda _, command, **__: done.append(command))
    launch.down(local, said.append)
    assert done == ["down"]
    assert any("its state may be kept" in line for line in said)


@pytest.mark.parametrize(
    ("said", "kind", "problem"),
    [
        ("ubuntu@h: Permission denied (publickey).", AccessError, "refuses user 'ubuntu' with the key"),
        ("Host key verification failed.", AccessError, "its host key has changed"),
        ("ssh: connect to host h port 22: Connection timed out", UnavailableError, "cannot be reached by ssh"),
        ("", UnavailableError, "no answer"),
    ],
)
def test_what_ssh_says_becomes_an_error_with_what_to_do(
    local: files.ClusterFile, said: str, kind: type[Exception], problem: str
) -> None:
    error = launch.refusal(local, "192.168.1.11", said)
    assert type(error) is kind
    assert problem in str(error)
    assert error.todo


def test_rays_launcher_gets_the_old_autoscaler_for_own_machines_only(local: files.ClusterFile) -> None:
    assert launch._environment(local)["RAY_UP_enable_autoscaler_v2"] == "0"
    assert "RAY_UP_enable_autoscaler_v2" not in launch._environment(files.read(ROOT / "cluster.yaml"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that never ends."""
    monkeypatch.setattr(launch, "_RAY", ("/bin/sh", "-c", "exec sleep 60"))


def test_a_launcher_that_hangs_is_ended_by_its_limit(
    local: files.ClusterFile, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.LAUNCHER_TIMEOUT_S >= 1800
    monkeypatch.setattr(launch, "run_on", lambda *_: "")
    with pytest.raises(StartError, match=r"ray down .* did not end within --timeout-s=0.2 s"):
        launch.down(local, lambda _: None, timeout_s=0.2)
    monkeypatch.setattr(launch, "check", lambda _: [])
    monkeypatch.setattr(launch, "_refuse_bad_certificates", lambda: None)
    with pytest.raises(StartError, match=r"ray up .* did not end within --start-timeout-s=0.2 s"):
        launch.up(local, lambda _: None, timeout_s=0.2)


def test_a_cloud_that_does_not_say_where_the_head_is_is_waited_for_no_longer_than_its_limit(
    slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "HEAD_IP_TIMEOUT_S", 0.2)
    with pytest.raises(UnavailableError, match=r"get-head-ip .* HEAD_IP_TIMEOUT_S=0.2 s"):
        launch.head_address(files.read(ROOT / "cluster.yaml"))


def test_an_address_is_never_read_as_an_option_of_ssh(
    tmp_path: Path, local: files.ClusterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = launch.run_on(local, "192.168.1.11", "true").splitlines()
    assert words[words.index("ubuntu@192.168.1.11") - 1] == "--"


def test_a_file_that_names_no_head_has_no_addresses(local: files.ClusterFile) -> None:
    headless = files.ClusterFile(local.path, "local", "x", {"provider": {"type": "local"}})
    with pytest.raises(ConfigError, match=r"provider\.head_ip is missing"):
        launch.addresses(headless)
