"""Certificates and token: who trusts whom, who can read what, and what happens when they end."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.clusters import certs
from modelyard.errors import ConfigError, NotFoundError

LOCAL = [ipaddress.ip_address("127.0.0.1")]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    certs.create(tmp_path / "authority", environment=[("MODELYARD_STORE", "s3://bucket/it's")])
    return tmp_path / "authority"


def node(authority: Path, name: str, addresses: list[certs.Address] = LOCAL) -> Path:
    folder = authority.parent / name
    certs.issue(folder, addresses, authority)
    return folder


def talk(server: Path, client: Path) -> str:
    """Let a client with one folder's certificate call a server with another's, each checking the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    said: list[str] = []

    def serve() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server / certs.CA_CERT))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(server / certs.NODE_CERT, server / certs.NODE_KEY)
        plain, _ = listener.accept()
        try:
            with context.wrap_socket(plain, server_side=True) as wrapped:
                wrapped.sendall(b"welcome")
        except ssl.SSLError as error:
            said.append(f"refused: {error.reason}")

    thread = threading.Thread(target=serve)
    thread.start()
    context = ssl.create_default_context(cafile=str(client / certs.CA_CERT))
    context.load_cert_chain(client / certs.NODE_CERT, client / certs.NODE_KEY)
    try:
        with (
            socket.create_connection(listener.getsockname()) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            said.append(wrapped.recv(100).decode())
    except ssl.SSLError as error:
        said.append(f"refused: {error.reason}")
    thread.join(10)
    listener.close()
    return "; ".join(sorted(said))


def test_nodes_of_one_authority_trust_each_other(authority: Path) -> None:
    assert talk(node(authority, "one"), node(authority, "two")) == "welcome"


def test_a_node_of_another_authority_is_refused(authority: Path, tmp_path: Path) -> None:
    certs.create(tmp_path / "elsewhere")
    stranger = tmp_path / "stranger"
    certs.issue(stranger, LOCAL, tmp_path / "elsewhere")
    (stranger / certs.CA_CERT).write_bytes((authority / certs.CA_CERT).read_bytes())
    assert "refused" in talk(node(authority, "one"), stranger)


def test_a_certificate_is_of_no_use_at_another_address(authority: Path) -> None:
    moved = node(authority, "moved", [ipaddress.ip_address("10.9.8.7")])
    assert "refused: CERTIFICATE_VERIFY_FAILED" in talk(moved, node(authority, "two"))


def test_only_the_owner_can_read_keys_and_token(authority: Path) -> None:
    folder = node(authority, "one")
    for path in (authority / "ca.key", authority / "token", folder / "node.key", folder / "token", folder / "node.env"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700


def test_the_environment_turns_tls_and_the_token_on_and_carries_the_settings(authority: Path) -> None:
    certs.issue(authority, LOCAL)
    script = f". {authority}/node.env; env"
    text = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert "RAY_USE_TLS=1" in text
    assert "RAY_AUTH_MODE=token" in text
    assert f"RAY_AUTH_TOKEN_PATH={authority}/token" in text
    assert "MODELYARD_STORE=s3://bucket/it's" in text


def test_a_good_certificate_is_kept_and_one_for_other_addresses_is_not(authority: Path) -> None:
    folder = node(authority, "one")
    first = (folder / certs.NODE_CERT).read_bytes()
    assert not certs.issue(folder, LOCAL, authority)
    assert (folder / certs.NODE_CERT).read_bytes() == first
    assert certs.issue(folder, [*LOCAL, ipaddress.ip_address("10.0.0.9")], authority)


def test_a_certificate_that_ends_soon_is_replaced(authority: Path) -> None:
    folder = authority.parent / "short"
    certs.issue(folder, LOCAL, authority, days=10)
    assert [each.problem for each in certs.inspect(folder) if each.file.name == "node.crt"] == ["expires in 9 days"]
    assert certs.issue(folder, LOCAL, authority)


def test_rotation_has_no_moment_at_which_nodes_refuse_each_other(authority: Path) -> None:
    old = node(authority, "old")
    certs.rotate(authority)
    (old / certs.CA_CERT).write_bytes((authority / certs.CA_CERT).read_bytes())
    renewed = node(authority, "renewed")
    assert talk(old, renewed) == "welcome"
    assert talk(renewed, old) == "welcome"
    certs.rotate(authority, is_last_step=True)
    last = node(authority, "last")
    assert talk(last, renewed) == "welcome"
    assert "refused" in talk(last, old)


def test_steps_of_a_rotation_out_of_order_are_refused(authority: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to finish"):
        certs.rotate(authority, is_last_step=True)
    certs.rotate(authority)
    with pytest.raises(ConfigError, match="a rotation is under way"):
        certs.rotate(authority)


def test_an_expired_authority_is_named(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=certs.CA_DAYS + 1)
    monkeypatch.setattr(certs, "_now", lambda: later)
    with pytest.raises(ConfigError, match="authority has expired"):
        node(authority, "late")
    assert [each.problem for each in certs.inspect(authority) if each.file.name == "ca.crt"] == ["expired"]


def test_a_second_authority_in_one_folder_is_refused(authority: Path) -> None:
    with pytest.raises(ConfigError, match="holds an authority already"):
        certs.create(authority)


def test_a_key_that_everyone_can_read_is_refused(authority: Path) -> None:
    (authority / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by everyone"):
        node(authority, "one")
    assert any("others can read it" in each.problem for each in certs.inspect(authority))


def test_a_node_can_forget_the_key_and_then_says_where_to_get_it(authority: Path) -> None:
    certs.issue(authority, LOCAL, forget=True)
    assert not (authority / "ca.key").exists()
    with pytest.raises(NotFoundError, match="cannot be renewed"):
        certs.issue(authority, [ipaddress.ip_address("10.0.0.9")])


def test_the_commands_make_and_show() -> None:
    runner = CliRunner()
    runner.invoke(modelyard, ["certs", "create", "--store", "s3://b/x"], catch_exceptions=False)
    runner.invoke(modelyard, ["certs", "node", "--address", "10.1.2.3"], catch_exceptions=False)
    shown = runner.invoke(modelyard, ["certs", "show"], catch_exceptions=False, standalone_mode=False)
    assert shown.return_value == 0
    assert "10.1.2.3" in shown.output
    wrong = runner.invoke(modelyard, ["certs", "node", "--address", "10.1.2"])
    assert isinstance(wrong.exception, ConfigError)
