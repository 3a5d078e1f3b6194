"""Cluster files: those we ship are right, and everything that can be wrong with one is named with what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.clusters import demand, files, instances
from modelyard.clusters.check import Problem, check
from modelyard.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTERS = ["cluster.yaml", "clusters/local.yaml", "clusters/gcp.yaml", "clusters/azure.yaml"]
MANIFESTS = ["deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml", "deploy/kuberay/rayservice.yaml"]


def changed(tmp_path: Path, file: str, change: Callable[[Any], Any]) -> list[Problem]:
    """The errors of a shipped file after a change to it."""
    data = copy.deepcopy(yaml.safe_load((ROOT / file).read_text()))
    change(data)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(data))
    return [problem for problem in check(files.read(path)) if problem.level == "error"]


@pytest.mark.parametrize("file", [*CLUSTERS, *MANIFESTS])
def test_what_is_shipped_has_no_error(file: str) -> None:
    assert [problem for problem in check(files.read(ROOT / file)) if problem.level == "error"] == []


@pytest.mark.parametrize("file", ["cluster.yaml", "clusters/gcp.yaml"])
def test_every_shipped_cluster_has_the_same_pools(file: str) -> None:
    types = files.read(ROOT / file).node_types
    assert {each.pool for each in types} == {"head", "a100", "l4", "cpu", "edge"}
    assert {each.name for each in types if each.is_spot} == {"a100-spot", "l4", "cpu"}
    assert [each.labels["modelyard/site"] for each in types if each.pool == "edge"] == ["north"]


@pytest.mark.parametrize("file", ["cluster.yaml", "clusters/local.yaml"])
def test_rays_own_launcher_accepts_the_files(file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / file).read_text())))


def types(data: Any) -> Any:
    return data["available_node_types"]


AWS: list[tuple[Callable[[Any], Any], str, str, str]] = [
    (lambda d: d.pop("head_setup_commands"), "head_setup_commands", "is left out", "head_setup_commands: []"),
    (
        lambda d: types(d)["l4"]["labels"].pop("modelyard/pool"),
        "available_node_types.l4.labels",
        "modelyard/pool",
        "add",
    ),
    (lambda d: types(d)["l4"]["labels"].pop("ray.io/accelerator-type"), "l4.labels", "accelerator-type", "add"),
    (
        lambda d: types(d)["l4"]["labels"].update({"modelyard/tier": "edgy"}),
        "l4.labels.modelyard/tier",
        "'edgy'",
        "edge",
    ),
    (lambda d: types(d)["l4"]["labels"].update({"modelyard/site": "-no-"}), "modelyard/site", "-no-", "letters"),
    (
        lambda d: types(d)["l4"]["node_config"].update(InstanceType="g6.13xlarge"),
        "l4.node_config",
        "13x",
        "did you mean 'g6.",
    ),
    (lambda d: types(d)["l4"]["node_config"].pop("InstanceType"), "l4.node_config", "no machine type", "InstanceType"),
    (
        lambda d: types(d)["l4"]["resources"].update(GPU=8),
        "l4.resources.GPU",
        "8, but g6.12xlarge has 4",
        "set GPU to 4",
    ),
    (lambda d: types(d)["cpu"]["resources"].update(CPU=64), "cpu.resources.CPU", "64, but m7i.4xlarge has 16", "16"),
    (lambda d: types(d)["cpu"]["resources"].update(CPU=1.5), "cpu.resources.CPU", "1.5", "correct"),
    (lambda d: types(d)["a100"].update(min_workers=9), "available_node_types.a100", "min_workers=9 is above", "lower"),
    (lambda d: d.update(max_workers=0), "max_workers", "0 is below the sum", "raise max_workers to 1"),
    (lambda d: d.update(head_node_type="hed"), "head_node_type", "'hed'", "did you mean 'head'"),
    (lambda d: d.update(max_wokers=3), "the file", "max_wokers", "did you mean 'max_workers'"),
    (
        lambda d: d.update(head_start_ray_commands=["ray start --head --autoscaling-config=x"]),
        "head_start_ray_commands",
        "TLS is off",
        "node.env",
    ),
    (
        lambda d: d.update(worker_start_ray_commands=["RAY_USE_TLS=1 ray start --address=$RAY_HEAD_IP:6379"]),
        "worker_start_ray_commands",
        "no token is asked for",
        "node.env",
    ),
    (
        lambda d: d.update(
            head_start_ray_commands=[d["head_start_ray_commands"][1].replace("host=127.0.0.1", "host=0.0.0.0")]
        ),
        "head_start_ray_commands",
        "would listen on 0.0.0.0",
        "127.0.0.1",
    ),
    (lambda d: d.update(docker={"image": "modelyard:latest"}), "docker.image", "changes under its name", "digest"),
    (
        lambda d: d["provider"]["security_group"].update(
            IpPermissions=[{"FromPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
        ),
        "security_group.IpPermissions.0",
        "opens port 8265 to all",
        "close it",
    ),
]


@pytest.mark.parametrize(("change", "field", "problem", "todo"), AWS)
def test_a_wrong_cloud_file_is_named(
    tmp_path: Path, change: Callable[[Any], Any], field: str, problem: str, todo: str
) -> None:
    found = changed(tmp_path, "cluster.yaml", change)
    assert any(field in each.field and problem in each.problem and todo in each.todo for each in found), found


LOCAL: list[tuple[Callable[[Any], Any], str, str]] = [
    (lambda d: d["provider"].update(head_ip="192.168.1.999"), "provider", "'192.168.1.999' is no address"),
    (lambda d: d["provider"].update(worker_ips=["192.168.1.11"] * 2), "provider", "listed twice"),
    (lambda d: d["provider"]["worker_ips"].append("192.168.1.77"), "metadata.hosts", "192.168.1.77 is missing"),
    (lambda d: d["provider"]["worker_ips"].pop(), "metadata.hosts.192.168.1.13", "neither head_ip nor"),
    (lambda d: d["metadata"]["hosts"]["192.168.1.11"].pop("zone"), "metadata.hosts.192.168.1.11", "zone is missing"),
    (lambda d: d["metadata"]["hosts"]["192.168.1.11"].update(gpu=4), "192.168.1.11.gpu", "unknown key"),
    (lambda d: d["provider"].pop("head_ip"), "provider.head_ip", "is missing"),
]


@pytest.mark.parametrize(("change", "field", "problem"), LOCAL)
def test_a_wrong_file_of_own_machines_is_named(
    tmp_path: Path, change: Callable[[Any], Any], field: str, problem: str
) -> None:
    found = changed(tmp_path, "clusters/local.yaml", change)
    assert any(field in each.field and problem in each.problem for each in found), found


def group(data: Any, number: int = 0) -> Any:
    return data["spec"]["workerGroupSpecs"][number]


def container(data: Any) -> Any:
    return group(data)["template"]["spec"]["containers"][0]


KUBERAY: list[tuple[Callable[[Any], Any], str, str]] = [
    (lambda d: group(d)["labels"].pop("modelyard/pool"), "workerGroupSpecs.0.labels", "modelyard/pool is missing"),
    (lambda d: group(d).update(replicas=9), "workerGroupSpecs.0.replicas", "9 is outside"),
    (lambda d: group(d).update(maxReplica=9), "workerGroupSpecs.0.maxReplica", "unknown key"),
    (lambda d: group(d, 1).update(groupName="a100"), "groupName", "'a100' is there twice"),
    (lambda d: container(d).update(image="modelyard"), "containers.0.image", "changes under its name"),
    (lambda d: container(d)["resources"]["limits"].pop("memory"), "limits.memory", "is missing"),
    (lambda d: container(d)["resources"]["limits"].update(cpu="many"), "limits.cpu", "no quantity"),
    (lambda d: container(d).update(env=[]), "containers.0.env", "plain text: no RAY_USE_TLS"),
    (lambda d: d["spec"].pop("authOptions"), "spec.authOptions.mode", "it is not token"),
    (lambda d: d["spec"].update(rayVersion="2.9.0"), "spec.rayVersion", "'2.9.0'"),
]


@pytest.mark.parametrize(("change", "field", "problem"), KUBERAY)
def test_a_wrong_manifest_is_named(tmp_path: Path, change: Callable[[Any], Any], field: str, problem: str) -> None:
    found = changed(tmp_path, "deploy/kuberay/raycluster.yaml", change)
    assert any(field in each.field and problem in each.problem for each in found), found


def test_a_wrong_serve_config_in_a_manifest_is_named(tmp_path: Path) -> None:
    found = changed(
        tmp_path, "deploy/kuberay/rayservice.yaml", lambda d: d["spec"].update(serveConfigV2="applications: 3")
    )
    assert [each.field for each in found] == ["spec.serveConfigV2"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cluster_name: x", "provider.type is missing"),
        ("provider: {type: awss}", "did you mean 'aws'"),
        ("apiVersion: v1\nkind: Pod", "v1 Pod is no cluster"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        files.read(tmp_path / "x.yaml")


def test_instance_figures_agree_with_each_other() -> None:
    for provider in ("aws", "gcp", "azure"):
        for name, instance in instances.known(provider).items():
            assert instance.name == name
            assert 1 <= instance.memory_gib / instance.cpus <= 21, instance
    assert instances.known("aws")["p4d.24xlarge"].accelerator == instances.Accelerator("A100", 8, 40)


def job(tmp_path: Path, **workers: Any) -> demand.Demand:
    config = yaml.safe_load((ROOT / "jobs" / "configs" / "tiny_gpt.yaml").read_text())
    config["training"] |= {"global_batch_size": 256}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**config, "workers": workers}))
    found = demand.demands(tmp_path)[0]
    assert found.kind == "train", found.note
    return found


def test_a_job_is_told_which_pools_could_hold_its_gang(tmp_path: Path) -> None:
    pools = files.read(ROOT / "cluster.yaml").node_types
    offer = demand.offer(job(tmp_path, min=16, max=256, gpus=1, cpus=4), pools)
    assert dict(offer.workers) == {"a100": 64, "l4": 32, "edge": 2}
    assert offer.fits
    assert not demand.offer(job(tmp_path, min=65, max=65, gpus=1), pools).fits
    pinned = demand.offer(job(tmp_path, min=1, max=4, gpus=1, pool="l4"), pools)
    assert dict(pinned.workers) == {"l4": 4}


def test_a_config_that_no_job_would_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("task: {kind: causal_lm}\nname: x\n")
    found = demand.demands(tmp_path)[0]
    assert found.kind == "invalid"
    assert "job.yaml" in found.note
    assert not demand.offer(found, files.read(ROOT / "cluster.yaml").node_types).fits


def test_the_command_prints_pools_jobs_and_problems(tmp_path: Path) -> None:
    runner = CliRunner()
    words = ["cluster", "check", str(ROOT / "cluster.yaml"), "--configs", str(ROOT / "jobs" / "configs")]
    answer = runner.invoke(modelyard, words, catch_exceptions=False, standalone_mode=False)
    assert answer.return_value == 0
    assert "8 x A100 40 GiB spot" in answer.output
    assert "tiny_gpt" in answer.output
    data = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    data["available_node_types"]["l4"]["node_config"]["InstanceType"] = "g6.nano"
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(data))
    words = ["cluster", "check", str(tmp_path / "bad.yaml"), "--configs", str(ROOT / "jobs" / "configs"), "--json"]
    answer = runner.invoke(modelyard, words, catch_exceptions=False, standalone_mode=False)
    assert answer.return_value == 2
    assert json.loads(answer.output)["problems"][0]["field"] == "available_node_types.l4.node_config"


def test_a_machine_gets_the_flags_of_its_own_entry() -> None:
    file = files.read(ROOT / "clusters" / "local.yaml")
    flags = files.host_flags(file, {"127.0.0.1", "192.168.1.11"})
    assert "--num-gpus=4" in flags
    assert any("modelyard/pool=a100" in flag and "ray.io/accelerator-type=A100" in flag for flag in flags)
    with pytest.raises(ConfigError, match="none of this machine's addresses"):
        files.host_flags(file, {"127.0.0.1"})
