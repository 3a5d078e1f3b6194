"""`modelyard doctor --cluster`: what is concluded about strangers, and that a real open port is found."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from modelyard.cli import doctor_cluster
from modelyard.cli.doctor_checks import Finding
from modelyard.cli.doctor_cluster import Door, Exposure, findings

CLOSED = Exposure("http://127.0.0.1:8265", 401, "10.0.0.1:6379", True, has_certificates=True)


def finding(name: str, **changes: Any) -> Finding:
    return next(each for each in findings(Exposure(**{**vars(CLOSED), **changes})) if each.name == name)


def test_a_closed_cluster_has_nothing_to_mend() -> None:
    assert {each.status for each in findings(CLOSED)} == {"ok"}


@pytest.mark.parametrize(
    ("name", "changes", "status", "value"),
    [
        ("dashboard", {"dashboard_status": 200}, "fail", "whoever reaches it can run code as you"),
        ("dashboard", {"dashboard_status": None}, "warn", "does not answer"),
        ("dashboard", {"dashboard_status": None, "is_named": True}, "fail", "does not answer"),
        ("dashboard wire", {"dashboard": "http://10.0.0.1:8265"}, "fail", "plain HTTP"),
        ("traffic", {"gcs_is_tls": False}, "fail", "speaks plain text"),
        ("traffic", {"gcs_is_tls": False, "is_one_machine": True}, "ok", "this machine only"),
        (
            "traffic",
            {"gcs_is_tls": False, "is_one_machine": True, "doors": [Door(1, "raylet", True), Door(2, "a", False)]},
            "warn",
            "1 of Ray's ports can be reached from other machines",
        ),
        ("port 8080", {"doors": [Door(8080, "agent", True, 200)]}, "warn", "answers anyone"),
        ("port 8000", {"doors": [Door(8000, "ProxyActor", True, 404)]}, "warn", "answers anyone with status 404"),
        (
            "other ports",
            {"doors": [Door(1, "a", True, 401), Door(2, "b", True), Door(3, "c", False, 200)]},
            "ok",
            "1 refuse a stranger, 1 do not speak HTTP",
        ),
        ("node.crt", {"certificates": [("node.crt", "expired", "renew it")]}, "fail", "expired"),
        ("ca.crt", {"certificates": [("ca.crt", "expires in 9 days", "rotate")]}, "warn", "9 days"),
    ],
)
def test_what_a_stranger_could_do_is_named(name: str, changes: dict[str, Any], status: str, value: str) -> None:
    found = finding(name, **changes)
    assert found.status == status
    assert value in found.value
    assert found.todo or status == "ok"


class Open(http.server.BaseHTTPRequestHandler):
    """A dashboard that lets everyone in."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def open_dashboard() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_open_dashboard_is_found(open_dashboard: str) -> None:
    gcs = open_dashboard.removeprefix("http://")
    found = doctor_cluster.gather(open_dashboard, gcs, is_one_machine=False)
    assert found.dashboard_status == 200
    assert found.gcs_is_tls is False
    assert {each.name for each in findings(found) if each.status == "fail"} == {"dashboard", "traffic"}


def test_nothing_there_is_no_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = doctor_cluster.gather(f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", is_one_machine=False)
    assert (found.dashboard_status, found.gcs_is_tls) == (None, None)
