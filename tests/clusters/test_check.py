"""Cluster files: those we ship are right, and everything that can be wrong with one is named with what to do."""

from __future__ import annotations

import copy
import functools
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.clusters import demand, files, instances
from modelyard.clusters.check import Problem, check
from modelyard.errors import ConfigError, ModelyardError

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
    (lambda d: types(d)["l4"].update(min_workers=-1), "l4.min_workers", "-1 is below 0", "0 or more"),
    (lambda d: d.update(cluster_name="a b;rm -rf /"), "cluster_name", "is no name", "letters"),
    (lambda d: d["auth"].update(ssh_user="-oProxyCommand=x"), "auth.ssh_user", "is no user's name", "letters"),
    (lambda d: d["provider"].pop("region"), "provider.region", "is missing", "name the region"),
    (
        lambda d: types(d)["a100"]["labels"].update({"ray.io/market-type": "spot"}),
        "a100.labels.ray.io/market-type",
        "'spot', but node_config asks for on-demand",
        "write on-demand",
    ),
    (
        lambda d: types(d)["l4"]["labels"].update({"ray.io/market-type": "on-demand"}),
        "l4.labels.ray.io/market-type",
        "'on-demand', but node_config asks for spot",
        "write spot",
    ),
    (
        lambda d: types(d)["l4"]["labels"].update({"ray.io/availability-zone": "eu-west-9z"}),
        "l4.labels.ray.io/availability-zone",
        "'eu-west-9z' is outside",
        "us-west-2a",
    ),
    (
        lambda d: d["provider"]["security_group"].update(IpPermissions=["x"]),
        "IpPermissions.0",
        "'x', which is no section",
        "key: value",
    ),
]


@pytest.mark.parametrize(("change", "field", "problem", "todo"), AWS)
def test_a_wrong_cloud_file_is_named(
    tmp_path: Path, change: Callable[[Any], Any], field: str, problem: str, todo: str
) -> None:
    found = changed(tmp_path, "cluster.yaml", change)
    assert any(field in each.field and problem in each.problem and todo in each.todo for each in found), found


def rule(first: int, last: int, *networks: str, protocol: str = "tcp") -> dict[str, Any]:
    v4 = [{"CidrIp": network} for network in networks if ":" not in network]
    v6 = [{"CidrIpv6": network} for network in networks if ":" in network]
    return {"FromPort": first, "ToPort": last, "IpProtocol": protocol, "IpRanges": v4, "Ipv6Ranges": v6}


@pytest.mark.parametrize(
    ("given", "is_open"),
    [
        (rule(22, 22, "0.0.0.0/0", "::/0"), False),
        (rule(8000, 8000, "203.0.113.0/24", "10.0.0.0/8", "2001:db8::/32"), False),
        (rule(22, 65535, "0.0.0.0/0"), True),
        (rule(0, 22, "0.0.0.0/0"), True),
        (rule(22, 22, "0.0.0.0/0", protocol="-1"), True),
        (rule(6379, 6379, "::/0"), True),
        (rule(6379, 6379, "0.0.0.0/1", "128.0.0.0/1"), True),
        (rule(6379, 6379, "8000::/1"), True),
    ],
)
def test_a_rule_that_lets_everybody_at_more_than_ssh_is_an_error(
    tmp_path: Path, given: dict[str, Any], is_open: bool
) -> None:
    found = changed(tmp_path, "cluster.yaml", lambda d: d["provider"]["security_group"].update(IpPermissions=[given]))
    assert any("to all" in each.problem for each in found) is is_open, found


SOURCED = ". ~/.modelyard/cluster/node.env && "
HEAD = "modelyard cluster keep-head -- ray start --head --autoscaling-config=x "
JOIN = "ray start --address=$RAY_HEAD_IP:6379"


@pytest.mark.parametrize(
    ("commands", "problem"),
    [
        ({"head": SOURCED + HEAD}, None),
        ({"head": SOURCED + HEAD + "--dashboard-host '127.0.0.1' # not 0.0.0.0"}, None),
        ({"head": SOURCED + HEAD + "--dashboard-host=localhost"}, None),
        ({"head": SOURCED + HEAD + '--dashboard-host="0.0.0.0"'}, "would listen on 0.0.0.0"),
        ({"head": SOURCED + HEAD + "--dashboard-host=$(hostname -I)"}, "known only at run time"),
        ({"head": SOURCED + HEAD + "--dashboard-host ::"}, "would listen on ::"),
        ({"head": SOURCED + HEAD + "--dashboard-host=10.0.0.1"}, "would listen on 10.0.0.1"),
        ({"head": SOURCED + HEAD + "'"}, "no shell can read it"),
        ({"worker": f"bash -lc '{SOURCED}{JOIN}'"}, None),
        ({"worker": f"export RAY_USE_TLS=1 RAY_AUTH_MODE=token && {JOIN}"}, None),
        ({"worker": f"{JOIN} # node.env"}, "TLS is off"),
        ({"worker": f"{JOIN} && {SOURCED} true"}, "TLS is off"),
        ({"worker": f"{SOURCED}export RAY_USE_TLS=0 && {JOIN}"}, "TLS is off"),
        ({"worker": f"{SOURCED}unset RAY_USE_TLS && {JOIN}"}, "TLS is off"),
        ({"worker": f"{SOURCED}RAY_AUTH_MODE=disabled {JOIN}"}, "no token is asked for"),
        ({"worker": f"# {SOURCED}\n{JOIN}"}, "TLS is off"),
    ],
)
def test_a_start_that_opens_a_node_is_an_error(tmp_path: Path, commands: dict[str, str], problem: str | None) -> None:
    lines = {f"{name}_start_ray_commands": [line] for name, line in commands.items()}
    found = changed(tmp_path, "cluster.yaml", lambda d: d.update(lines))
    assert any(problem in each.problem for each in found) if problem else found == [], found


LOCAL: list[tuple[Callable[[Any], Any], str, str]] = [
    (lambda d: d["provider"].update(head_ip="192.168.1.999"), "provider", "'192.168.1.999' is no IP address"),
    (lambda d: d["provider"].update(worker_ips=["192.168.1.11"] * 2), "provider", "listed twice"),
    (lambda d: d["provider"]["worker_ips"].append("192.168.1.77"), "metadata.hosts", "192.168.1.77 is missing"),
    (lambda d: d["provider"]["worker_ips"].pop(), "metadata.hosts.192.168.1.13", "neither head_ip nor"),
    (lambda d: d["metadata"]["hosts"]["192.168.1.11"].pop("zone"), "metadata.hosts.192.168.1.11", "zone is missing"),
    (lambda d: d["metadata"]["hosts"]["192.168.1.11"].update(gpu=4), "192.168.1.11.gpu", "unknown key"),
    (lambda d: d["provider"].pop("head_ip"), "provider.head_ip", "is missing"),
    (lambda d: d["provider"].update(head_ip="head.lan"), "provider", "'head.lan' is no IP address"),
    (lambda d: d["provider"]["worker_ips"].append("node-1"), "provider", "'node-1' is no IP address"),
    (lambda d: host(d).update(cpus=-4), "192.168.1.11.cpus", "-4 is no whole number"),
    (lambda d: host(d).update(cpus="4; touch /tmp/x"), "192.168.1.11.cpus", "is no whole number"),
    (lambda d: host(d).update(gpus=0.5), "192.168.1.11.gpus", "0.5 is no whole number"),
    (lambda d: host(d).update(gpus=True), "192.168.1.11.gpus", "True is no whole number"),
    (lambda d: host(d).update(resources={"x": "$(id)"}), "192.168.1.11.resources.x", "is no number"),
    (lambda d: host(d).update(resources={"x": float("nan")}), "192.168.1.11.resources.x", "is no number"),
    (lambda d: host(d).update(resources={"CPU": 9}), "192.168.1.11.resources.CPU", "is no name for a resource"),
    (lambda d: host(d).update(resources={"a b": 1}), "192.168.1.11.resources.a b", "is no name for a resource"),
    (lambda d: host(d).update(resources=["x"]), "192.168.1.11.resources", "which is no section"),
    (lambda d: host(d).update(labels=["x"]), "192.168.1.11.labels", "which is no section"),
]


def host(data: Any) -> Any:
    return data["metadata"]["hosts"]["192.168.1.11"]


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


def environment(data: Any, name: str) -> Any:
    return next(each for each in container(data)["env"] if each["name"] == name)


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
    (lambda d: environment(d, "RAY_USE_TLS").update(value="0"), "containers.0.env", "RAY_USE_TLS is '0'"),
    (lambda d: environment(d, "RAY_TLS_CA_CERT").update(value=""), "containers.0.env", "no RAY_TLS_CA_CERT"),
    (lambda d: d["spec"]["headGroupSpec"].update(serviceType="LoadBalancer"), "serviceType", "'LoadBalancer' opens"),
    (lambda d: d["spec"]["headGroupSpec"].update(enableIngress=True), "enableIngress", "in plain HTTP"),
    (lambda d: d["spec"].update(workerGroupSpecs={"a": 1}), "spec.workerGroupSpecs", "which is no list"),
    (lambda d: d["spec"].update(workerGroupSpecs=["a"]), "spec.workerGroupSpecs.0", "which is no section"),
    (lambda d: group(d)["rayStartParams"].update({"num-cpus": "-1"}), "rayStartParams.num-cpus", "no whole number"),
    (lambda d: group(d)["rayStartParams"].update({"num-cpus": 4}), "rayStartParams.num-cpus", "is no string"),
    (lambda d: group(d).update(replicas="2"), "workerGroupSpecs.0.replicas", "no whole number"),
    (
        lambda d: container(d)["resources"]["requests"].update(cpu="400"),
        "resources.requests.cpu",
        "400 is above the limit 90",
    ),
    (lambda d: d["metadata"].update(name="Bad_Name!"), "metadata.name", "is no name for Kubernetes"),
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
        ("apiVersion: ray.io/v9\nkind: RayCluster", "ray.io/v9 RayCluster is no cluster"),
        ("a: [", "not valid YAML"),
    ],
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        files.read(tmp_path / "x.yaml")


def sections(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every mapping and list within."""
    if isinstance(value, dict | list):
        yield path
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from sections(each, (*path, key))


@pytest.mark.parametrize(
    "file", ["cluster.yaml", "clusters/local.yaml", "clusters/gcp.yaml", "clusters/azure.yaml", *MANIFESTS[1:]]
)
def test_a_section_of_any_other_shape_is_named_and_never_a_crash(file: str) -> None:
    shipped = files.read(ROOT / file)
    job = demand.Demand("job", "train", per_worker={"CPU": 1.0})
    ways = [way for way in sections(shipped.data) if way and not any(isinstance(key, int) and key for key in way)]
    assert len(ways) >= 10
    for *way, last in ways:
        for other in (["word"], "word", 3, {"word": 1}, {5: ["word"]}):
            data = copy.deepcopy(dict(shipped.data))
            place = functools.reduce(operator.getitem, way, data)
            place[last] = other
            changed = files.ClusterFile(shipped.path, shipped.kind, shipped.name, data)
            try:
                demand.offer(job, changed.node_types)
            except ModelyardError:
                assert any(each.level == "error" for each in check(changed)), (way, last, other)
            else:
                check(changed)


@pytest.mark.parametrize(
    "words", ["provider: [a]", "provider: {type: [aws]}", "kind: [RayCluster]", "metadata: &a [*a]"]
)
def test_a_file_of_another_shape_is_refused_when_it_is_read(tmp_path: Path, words: str) -> None:
    (tmp_path / "x.yaml").write_text(words)
    with pytest.raises(ConfigError):
        files.read(tmp_path / "x.yaml")


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("cluster_name: x\nprovider: {type: local}\nmetadata: &a {b: [*a]}\n")
    with pytest.raises(ConfigError, match="nested too deeply"):
        check(files.read(tmp_path / "x.yaml"))


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


@pytest.mark.parametrize(
    ("text", "code", "summary"),
    [
        ("workers: {min: 1, gpus: 900}", 0, "0 errors"),
        ("foo: 1", 1, "1 errors"),
        ("a: [", 1, "1 errors"),
        ("source: {kind: nothing}", 1, "1 errors"),
    ],
)
def test_job_configs_that_cannot_run_are_counted(tmp_path: Path, text: str, code: int, summary: str) -> None:
    config = (ROOT / "jobs" / "configs" / "points.yaml").read_text()
    (tmp_path / "job.yaml").write_text(f"{config}\n{text}\n" if "workers" in text else text)
    words = ["cluster", "check", str(ROOT / "cluster.yaml"), "--configs", str(tmp_path)]
    answer = CliRunner().invoke(modelyard, words, catch_exceptions=False, standalone_mode=False)
    last = answer.output.splitlines()[-1]
    assert (answer.return_value, summary in last) == (code, True), last
    assert ("1 invalid job configs" if code else "1 jobs without room") in last


def test_every_shipped_job_config_is_of_a_kind_that_a_schema_knows() -> None:
    kinds = {each.name: each.kind for each in demand.demands(ROOT / "jobs" / "configs")}
    assert "invalid" not in kinds.values(), kinds
    known = {"pydocs": "prepare", "evaluate_tiny_gpt": "evaluate", "tune_digits": "tune", "compress_half": "compress"}
    assert {name: kinds[name] for name in known} == known


def test_a_file_of_the_wrong_shape_is_printed_with_its_problems(tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**data, "available_node_types": [1]}))
    words = ["cluster", "check", str(tmp_path / "bad.yaml"), "--configs", str(ROOT / "jobs" / "configs")]
    answer = CliRunner().invoke(modelyard, words, catch_exceptions=False, standalone_mode=False)
    assert answer.return_value == 2
    assert "available_node_types: [1] is not of type 'object'" in answer.output


def test_a_machine_gets_the_flags_of_its_own_entry() -> None:
    file = files.read(ROOT / "clusters" / "local.yaml")
    flags = files.host_flags(file, {"127.0.0.1", "192.168.1.11"})
    assert "--num-gpus=4" in flags
    assert any("modelyard/pool=a100" in flag and "ray.io/accelerator-type=A100" in flag for flag in flags)
    with pytest.raises(ConfigError, match="none of this machine's addresses"):
        files.host_flags(file, {"127.0.0.1"})


def test_a_file_is_checked_where_there_are_no_job_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(modelyard, ["cluster", "check", str(ROOT / "cluster.yaml")])
    assert answer.exit_code == 0, answer.output
    answer = CliRunner().invoke(modelyard, ["cluster", "check", str(ROOT / "cluster.yaml"), "--configs", "none"])
    assert "no folder 'none' of job configs" in str(answer.exception)
