"""Certificates and token: who trusts whom, who can read what, and what happens when they end."""

from __future__ import annotations

import datetime as dt
import ipaddress
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelyard.cli.main import modelyard
from modelyard.clusters import certs
from modelyard.clusters.authority import CA_DAYS, Address
from modelyard.errors import ConfigError, InputError, NotFoundError

LOCAL = [ipaddress.ip_address("127.0.0.1")]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    certs.create(tmp_path / "authority", environment=[("MODELYARD_STORE", "s3://bucket/it's")])
    return tmp_path / "authority"


def node(authority: Path, name: str, addresses: list[Address] = LOCAL) -> Path:
    folder = authority.parent / name
    certs.issue(folder, addresses, authority)
    return folder


def problems(folder: Path) -> dict[str, str]:
    return {each.file.name: each.problem for each in certs.inspect(folder) if each.problem}


def run(*words: str) -> Result:
    return CliRunner().invoke(modelyard, ["certs", *words])


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


@pytest.mark.parametrize(("days", "kept_at", "replaced_at"), [(10, 6, 7), (365, 334, 336)])
def test_a_certificate_is_replaced_when_it_ends_soon_for_its_own_life(
    authority: Path, monkeypatch: pytest.MonkeyPatch, days: int, kept_at: int, replaced_at: int
) -> None:
    folder, made_at = authority.parent / "short", dt.datetime.now(dt.UTC)
    certs.issue(folder, LOCAL, authority, days=days)
    monkeypatch.setattr("modelyard.clusters.authority.now", lambda: made_at + dt.timedelta(days=kept_at))
    assert problems(folder) == {}
    assert not certs.issue(folder, LOCAL, authority, days=days)
    monkeypatch.setattr("modelyard.clusters.authority.now", lambda: made_at + dt.timedelta(days=replaced_at))
    assert problems(folder) == {"node.crt": f"expires in {days - replaced_at - 1} days"}
    assert certs.issue(folder, LOCAL, authority, days=days)


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
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=CA_DAYS + 1)
    monkeypatch.setattr("modelyard.clusters.authority.now", lambda: later)
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


def test_a_node_can_forget_the_key_and_then_says_where_to_get_it(authority: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(authority, folder)
    certs.issue(folder, LOCAL, authority, forget=True)
    assert not (folder / "ca.key").exists()
    with pytest.raises(NotFoundError, match="cannot be renewed"):
        certs.issue(folder, [ipaddress.ip_address("10.0.0.9")])


def test_what_may_be_the_only_key_is_never_forgotten(authority: Path) -> None:
    for named in (None, authority):
        with pytest.raises(ConfigError, match="may be the only one\n  -> name where it is kept"):
            certs.issue(authority, LOCAL, named, forget=True)
    assert (authority / "ca.key").exists()


def test_the_commands_make_and_show() -> None:
    runner = CliRunner()
    runner.invoke(modelyard, ["certs", "create", "--store", "s3://b/x"], catch_exceptions=False)
    runner.invoke(modelyard, ["certs", "node", "--address", "10.1.2.3"], catch_exceptions=False)
    shown = runner.invoke(modelyard, ["certs", "show"], catch_exceptions=False, standalone_mode=False)
    assert shown.return_value == 0
    assert "10.1.2.3" in shown.output
    wrong = runner.invoke(modelyard, ["certs", "node", "--address", "10.1.2"])
    assert isinstance(wrong.exception, ConfigError)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("node.crt", b"junk", "is no certificate"),
        ("node.crt", b"", "is no certificate"),
        ("node.key", b"junk", "is no key"),
        ("node.key", None, "its key, node.key, is missing"),
        ("node.key", "other", "does not belong to node.crt"),
    ],
)
def test_a_broken_certificate_or_key_of_a_node_is_shown_and_made_anew(
    authority: Path, file: str, content: bytes | str | None, problem: str
) -> None:
    folder = node(authority, "one")
    if content is None:
        (folder / file).unlink()
    else:
        made = content if isinstance(content, bytes) else (node(authority, content) / file).read_bytes()
        (folder / file).write_bytes(made)
    assert problem in problems(folder).values()
    assert certs.issue(folder, LOCAL, authority)
    assert problems(folder) == {}
    assert talk(folder, node(authority, "two")) == "welcome"


@pytest.mark.parametrize("content", [b"junk", b"", "other"])
def test_a_broken_key_of_an_authority_is_named_and_a_rotation_replaces_it(
    authority: Path, content: bytes | str
) -> None:
    old = node(authority, "old")
    if isinstance(content, str):
        certs.create(authority.parent / content)
        content = (authority.parent / content / "ca.key").read_bytes()
    (authority / "ca.key").write_bytes(content)
    assert list(problems(authority)) == ["ca.key"]
    with pytest.raises(
        ConfigError, match=r"ca\.key.*\n  -> bring ca.key back from a backup; or: modelyard certs rotate"
    ):
        node(authority, "new")
    certs.rotate(authority)
    assert problems(authority) == {}
    (old / certs.CA_CERT).write_bytes((authority / certs.CA_CERT).read_bytes())
    assert talk(node(authority, "new"), old) == "welcome"
    certs.rotate(authority, is_last_step=True)


@pytest.mark.parametrize("content", [b"junk", b"", None])
def test_a_broken_certificate_of_an_authority_says_how_to_go_on(authority: Path, content: bytes | None) -> None:
    if content is None:
        (authority / "ca.crt").unlink()
    else:
        (authority / "ca.crt").write_bytes(content)
    todo = "modelyard backup restore brings back ca.crt and ca.key; or remove both, then: modelyard certs create"
    for act in (certs.inspect, certs.create, certs.rotate, certs.issue):
        with pytest.raises(InputError, match=r"ca\.crt") as caught:
            act(authority)
        assert todo in caught.value.todo
    for name in ("ca.crt", "ca.key"):
        (authority / name).unlink(missing_ok=True)
    certs.create(authority)
    assert problems(authority) == {}


@pytest.mark.parametrize("stopped_at", ["token", "ca.crt", "ca.key"])
def test_a_rotation_stopped_anywhere_leaves_a_working_authority_and_can_be_repeated(
    authority: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str
) -> None:
    old, write = node(authority, "old"), certs._write

    def stop(path: Path, data: bytes, mode: int = 0o600) -> None:
        if path.name == stopped_at:
            raise KeyboardInterrupt
        write(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(certs, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            certs.rotate(authority, also_token=True)
    between = node(authority, "between")
    assert talk(between, old) == "welcome"
    if stopped_at == "ca.key":
        assert problems(authority) == {"ca.key": "belongs to the old authority: a rotation was stopped half-way"}
        with pytest.raises(ConfigError, match=r"not the key of the new authority\n  -> first, once more"):
            certs.rotate(authority, is_last_step=True)
    certs.rotate(authority)
    assert problems(authority) == {}
    (old / certs.CA_CERT).write_bytes((authority / certs.CA_CERT).read_bytes())
    assert talk(node(authority, "new"), old) == "welcome"
    certs.rotate(authority, is_last_step=True)
    assert talk(node(authority, "last"), node(authority, "new")) == "welcome"


@pytest.mark.parametrize("name", ["", "n" * 65])
def test_a_name_that_no_certificate_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    refused = run("create", "--folder", str(tmp_path / "made"), "--name", name)
    assert isinstance(refused.exception, ConfigError)
    assert "1 to 64 characters" in str(refused.exception)
    assert not (tmp_path / "made").exists()
    certs.create(tmp_path / "made", "n" * 64)


@pytest.mark.parametrize("option", ["--redis-password-file", "--redis-ca"])
def test_files_are_read_before_anything_is_made(tmp_path: Path, option: str) -> None:
    refused = run("create", "--folder", str(tmp_path / "made"), "--redis", "rediss://a:1", option, "/nope")
    assert isinstance(refused.exception, NotFoundError)
    assert not (tmp_path / "made").exists()


def test_a_node_gets_the_settings_of_the_authority(authority: Path) -> None:
    folder = node(authority, "one")
    assert (folder / "settings.env").read_bytes() == (authority / "settings.env").read_bytes()


def test_a_node_is_not_put_into_a_folder_with_an_authority_of_its_own(authority: Path, tmp_path: Path) -> None:
    certs.create(tmp_path / "own")
    before = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    with pytest.raises(ConfigError, match="holds an authority of its own"):
        certs.issue(tmp_path / "own", LOCAL, authority)
    assert {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()} == before


def test_a_folder_that_was_there_is_closed_to_others_unless_many_share_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    certs.create(tmp_path / "open")
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    with pytest.raises(ConfigError, match="many share"):
        certs.create(tmp_path / "shared")


def test_names_of_variables_are_ascii(tmp_path: Path) -> None:
    refused = run("create", "--folder", str(tmp_path / "made"), "--env", "N\u00c4ME=1")
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("variable", sorted(certs.variables(Path("any"))))
def test_a_setting_cannot_turn_off_what_the_certificates_are_for(tmp_path: Path, variable: str) -> None:
    refused = run("create", "--folder", str(tmp_path / "made"), "--env", f"{variable}=0")
    assert isinstance(refused.exception, ConfigError)
    assert f"--env {variable}" in str(refused.exception)
    assert not (tmp_path / "made").exists()


def test_a_relative_folder_is_found_from_everywhere(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(authority.parent)
    made = run("node", "--folder", authority.name, "--address", "127.0.0.1")
    assert made.exit_code == 0, made.output
    script = f". {authority}/node.env; cat $RAY_TLS_SERVER_CERT $RAY_AUTH_TOKEN_PATH; echo $MODELYARD_STORE"
    text = subprocess.run(["bash", "-ec", script], cwd="/", capture_output=True, text=True, check=True).stdout
    assert (authority / "node.crt").read_text() + (authority / "token").read_text() in text
    assert "s3://bucket/it's" in text


@pytest.mark.parametrize(("token", "problem"), [(None, "is missing"), (b"", "is empty"), (b" \n", "is empty")])
def test_a_token_that_is_not_there_is_shown_and_made_anew(authority: Path, token: bytes | None, problem: str) -> None:
    if token is None:
        (authority / "token").unlink()
    else:
        (authority / "token").write_bytes(token)
    assert problems(authority) == {"token": problem}
    assert "modelyard certs rotate --token" in {each.todo for each in certs.inspect(authority)}
    shown = CliRunner().invoke(modelyard, ["certs", "show", "--folder", str(authority)], standalone_mode=False)
    assert shown.return_value == 1
    assert run("rotate", "--token", "--folder", str(authority)).exit_code == 0
    assert problems(authority) == {}
    assert certs.token_of(authority)


def test_a_node_without_a_token_gets_it_from_where_the_key_is(authority: Path) -> None:
    folder = node(authority, "one")
    (folder / "token").unlink()
    assert [each.todo for each in certs.inspect(folder) if each.problem == "is missing"] == [
        "modelyard up FILE, from where the cluster was started: it brings the token along"
    ]


@pytest.mark.parametrize("name", certs.SECRET)
def test_a_secret_that_is_no_file_is_shown(authority: Path, name: str) -> None:
    certs.issue(authority, LOCAL)
    (authority / name).unlink(missing_ok=True)
    (authority / name).mkdir()
    assert problems(authority)[name] == "is no file"


def test_a_new_token_takes_the_place_of_an_empty_folder(authority: Path) -> None:
    (authority / "token").unlink()
    (authority / "token").mkdir()
    certs.rotate(authority, also_token=True)
    assert problems(authority) == {}


def test_a_rotation_is_not_finished_while_this_node_has_a_certificate_of_the_old_authority(authority: Path) -> None:
    certs.issue(authority, LOCAL)
    certs.rotate(authority)
    refused = run("rotate", "--finish", "--folder", str(authority))
    assert isinstance(refused.exception, ConfigError)
    assert "still signed by the old authority\n  -> first: modelyard certs node" in str(refused.exception)
    assert talk(authority, authority) == "welcome"
    certs.issue(authority, LOCAL)
    assert run("rotate", "--finish", "--folder", str(authority)).exit_code == 0
    assert problems(authority) == {}


def test_the_last_step_of_a_rotation_makes_no_token(authority: Path) -> None:
    certs.rotate(authority)
    before = {path.name: path.read_bytes() for path in authority.iterdir()}
    refused = run("rotate", "--token", "--finish", "--folder", str(authority))
    assert isinstance(refused.exception, ConfigError)
    assert "--token goes with the first step" in str(refused.exception)
    assert {path.name: path.read_bytes() for path in authority.iterdir()} == before


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\x1b[31m", "a\udcffb"])
def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path, name: str) -> None:
    refused = run("create", "--folder", str(tmp_path / "made"), "--name", name)
    assert isinstance(refused.exception, ConfigError)
    assert "cannot be printed" in str(refused.exception)
    assert not (tmp_path / "made").exists()
