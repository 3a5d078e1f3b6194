"""`cluster.yaml` for real, without a cloud: a server that speaks EC2 hands out the addresses of hosts made here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.clusters.conftest import ROOT, Launched, must, until
from tests.clusters.hosts import Hosts, hosts, why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
REGION, PORT = "us-west-2", 5055
FIRST = 4
"""EC2 keeps the first three addresses of a subnet."""


@dataclass(frozen=True)
class Cloud:
    """An EC2 with one subnet, and the variables that lead to it."""

    client: Any
    subnet: str
    image: str
    variables: dict[str, str]

    def running(self) -> list[str]:
        """The node types of its instances that run."""
        found = self.client.describe_instances(Filters=[{"Name": "instance-state-name", "Values": ["running"]}])
        instances = [each for group in found["Reservations"] for each in group["Instances"]]
        tags = [{tag["Key"]: tag["Value"] for tag in each.get("Tags", [])} for each in instances]
        return sorted(each.get("ray-user-node-type", "?") for each in tags)


@contextlib.contextmanager
def cloud(made: Hosts, folder: Path) -> Iterator[Cloud]:
    """Start the server on the bridge, where the hosts reach it, with key, network and security group made."""
    import boto3

    network = made[0].address.rpartition(".")[0]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}
    variables = {**keys, "AWS_ENDPOINT_URL": f"http://{network}.254:{PORT}"}
    command = [sys.executable, "-m", "moto.server", "-H", f"{network}.254", "-p", str(PORT)]
    environment = {**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        client = boto3.client(
            "ec2",
            REGION,
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        until("the server answers", lambda: _answers(client), 60)
        client.import_key_pair(KeyName="hosts", PublicKeyMaterial=made.key.with_suffix(".pub").read_bytes())
        vpc = client.create_vpc(CidrBlock=f"{network}.0/24")["Vpc"]["VpcId"]
        place = {"CidrBlock": f"{network}.0/24", "AvailabilityZone": f"{REGION}a"}
        subnet = client.create_subnet(VpcId=vpc, **place)["Subnet"]["SubnetId"]
        group = client.create_security_group(GroupName="modelyard", Description="inside", VpcId=vpc)["GroupId"]
        rule = {"IpProtocol": "-1", "FromPort": -1, "ToPort": -1, "UserIdGroupPairs": [{"GroupId": group}]}
        client.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
        yield Cloud(client, subnet, client.describe_images()["Images"][0]["ImageId"], variables)
    finally:
        process.kill()
        process.wait(10)


def _answers(client: Any) -> bool:
    try:
        client.describe_vpcs()
    except Exception:  # noqa: BLE001  whatever botocore raises until it listens
        return False
    return True


def overridden(made: Hosts, up: Cloud, folder: Path) -> Path:
    """`cluster.yaml` with the network and key of this cloud, smaller nodes, and programs that are there already."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    data["provider"]["use_internal_ips"] = True
    data["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    data["idle_timeout_minutes"] = 0.3
    for entry in data["available_node_types"].values():
        entry["node_config"] |= {"ImageId": up.image, "KeyName": "hosts", "SubnetIds": [up.subnet]}
        entry["resources"]["CPU"] = min(entry["resources"]["CPU"], 1)
    data["file_mounts"] = {"~/.modelyard/cluster": str(folder / "home" / "cluster")}
    data["setup_commands"] = ["chmod 700 ~/.modelyard ~/.modelyard/cluster", "modelyard certs node"]
    path = folder / "aws.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Launched, Cloud]]:
    """The cluster of `cluster.yaml`, up."""
    if reason := why_not():
        pytest.skip(f"hosts of network namespaces: {reason}")
    folder = tmp_path_factory.mktemp("aws")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MODELYARD_"))}
    with hosts(FIRST + 2, folder) as made, cloud(made, folder) as up:
        home = {"HOME": str(folder), "MODELYARD_HOME": str(folder / "home"), "RAY_TMPDIR": str(folder)}
        environment = {**kept, **up.variables, **home, "RAY_USAGE_STATS_ENABLED": "0"}
        for host in made.members:  # as on an image of yours: the programs and the address of the cloud are there
            lines = [f"export {name}={value}\n" for name, value in up.variables.items()]
            with (host.home / ".bashrc").open("a") as profile:
                profile.writelines(lines)
        launched = Launched(made, overridden(made, up, folder), folder, environment)
        must(launched.modelyard("certs", "create"))
        must(launched.modelyard("up", str(launched.file), timeout_s=300))
        yield launched, up


ASK = """
import contextlib, json, sys, ray
from modelyard.scheduling import Request, lease
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
with contextlib.ExitStack() as stack:
    if "grow" in sys.argv:
        request = Request(job_id="wants-l4", min_workers=1, max_workers=1, pools=("l4",))
        held = stack.enter_context(lease(request, timeout_s=240))
        stack.enter_context(held.placement_group(timeout_s=60))
    print("NODES" + json.dumps([node["Labels"] for node in ray.nodes() if node["Alive"]]))
"""


def on_head(launched: Launched, line: str) -> str:
    """What a command prints on the head, which is the first instance that was launched."""
    line = f". ~/.bashrc; . ~/.modelyard/cluster/node.env; {line}"
    return must(launched.hosts[FIRST - 1].run("bash", "-c", line, timeout_s=300)).stdout


def ask(launched: Launched, *words: str) -> list[dict[str, str]]:
    """The labels of all nodes, asked on the head; `grow` does so while it holds a lease of a GPU of the pool l4."""
    (launched.folder / "ask.py").write_text(ASK)
    text = on_head(launched, f"python {launched.folder / 'ask.py'} {' '.join(words)}")
    labels: list[dict[str, str]] = json.loads(text.partition("NODES")[2])
    return labels


def test_the_head_and_the_edge_site_come_up_with_their_labels(aws: tuple[Launched, Cloud]) -> None:
    launched, up = aws
    until("the edge node runs", lambda: up.running() == ["edge-north", "head"], 60)
    labels = until("it has joined", lambda: len(found := ask(launched)) == 2 and found, 120)
    sites = {each["modelyard/pool"]: (each["modelyard/site"], each["modelyard/tier"]) for each in labels}
    assert sites == {"head": ("us-west-2", "cloud"), "edge": ("north", "edge")}


def test_a_lease_that_needs_an_l4_grows_exactly_that_pool_and_idle_nodes_go(aws: tuple[Launched, Cloud]) -> None:
    launched, up = aws
    on_head(launched, "modelyard scheduler start --policy fifo")
    labels = ask(launched, "grow")
    assert sorted(each["modelyard/pool"] for each in labels) == ["edge", "head", "l4"]
    assert up.running() == ["edge-north", "head", "l4"]
    until("the idle node is gone", lambda: up.running() == ["edge-north", "head"], 120)


def test_down_leaves_no_instance(aws: tuple[Launched, Cloud]) -> None:
    launched, up = aws
    must(launched.modelyard("down", str(launched.file)))
    assert up.running() == []
