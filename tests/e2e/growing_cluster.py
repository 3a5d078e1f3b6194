"""A Ray head whose autoscaler launches fake nodes by label, as `ray up` does on a cloud."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

_HEAD = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"  # the fake provider knows no other


@contextmanager
def growing_cluster(node_types: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """Address and autoscaling config of a head without CPUs that can launch `node_types`; connected to it."""
    folder = Path(tempfile.mkdtemp(prefix="my-grow-"))
    port = _free_port()
    config = folder / "cluster.yaml"  # JSON is YAML
    config.write_text(json.dumps(_config(node_types, port)))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=0", f"--autoscaling-config={config}", f"--temp-dir={folder / 'ray'}"]
    command += ["--include-dashboard=false", f"--ray-client-server-port={_free_port()}"]
    command += [f"--dashboard-agent-listen-port={_free_port()}"]
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
    }
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        _join(f"127.0.0.1:{port}", folder / "log")
        yield f"127.0.0.1:{port}", config
    finally:
        ray.shutdown()
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def _config(node_types: Mapping[str, Mapping[str, Any]], port: int) -> dict[str, Any]:
    lists = ["head_start_ray", "worker_start_ray", "setup", "head_setup", "worker_setup", "initialization"]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    return {
        "cluster_name": "growing",
        "max_workers": 8,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": _HEAD,
            "gcs_address": address,
        },
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, **each} for name, each in node_types.items()},
        },
        "head_node_type": _HEAD_TYPE,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in lists},
    }


def _join(address: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except (ConnectionError, RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"the head does not answer: {error}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
