"""The certificates and the token of a cluster: one authority, a certificate for each node, checked on both sides.

`create` makes the authority and the token in a folder on the machine of who starts clusters. The folder goes to every
node, where `issue` makes the node's own certificate for the addresses it has. Ray checks that the address it calls
is in the certificate, so a certificate is of no use on another machine.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from modelyard.clusters.authority import (
    Address,
    check_name,
    common_name,
    days_until,
    fits,
    is_due,
    is_signed_by,
    key_pem,
    load,
    load_key,
    names_in,
    new_authority,
    pem,
    sign,
)
from modelyard.config import settings
from modelyard.errors import ConfigError, NotFoundError, StorageError

CA_CERT, CA_KEY, TOKEN, SETTINGS = "ca.crt", "ca.key", "token", "settings.env"
NODE_CERT, NODE_KEY, NODE_ENV = "node.crt", "node.key", "node.env"
HEAD_ENV, REDIS_CA = "head.env", "redis-ca.crt"
"""Where the head keeps the cluster's state, and who signed that server's certificate."""
NODE_DAYS = 365
MAX_PORT = 65535
HEAD_PATIENCE_S = 600
"""How long a node waits for a head that is away, before it gives up and stops."""
SECRET = (CA_KEY, TOKEN, SETTINGS, NODE_KEY, NODE_ENV, HEAD_ENV)
"""Files that only their owner may read."""

_NEW_AUTHORITY = (
    f"modelyard backup restore brings back {CA_CERT} and {CA_KEY}; or remove both, then: modelyard certs create, and "
    "modelyard up FILE for every node"
)
_NEW_KEY = (
    f"bring {CA_KEY} back from a backup; or: modelyard certs rotate makes a new authority, and nodes trust the old one "
    "until modelyard certs rotate --finish"
)


@dataclass(frozen=True)
class Status:
    """One certificate, or the token, as found."""

    file: Path
    subject: str
    names: tuple[str, ...]
    """Addresses and host names it holds for."""
    expires: dt.datetime | None
    problem: str = ""
    todo: str = ""

    @property
    def days_left(self) -> int | None:
        """Whole days until it ends; negative when it has ended."""
        return None if self.expires is None else days_until(self.expires)


def default_folder() -> Path:
    """`~/.modelyard/cluster`, or below `MODELYARD_HOME`."""
    return settings().home / "cluster"


def own_addresses() -> list[Address]:
    """The addresses of this machine's interfaces, loopback first."""
    import psutil  # type: ignore[import-untyped]

    found = set()
    for interface in psutil.net_if_addrs().values():
        for each in interface:
            if each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address:
                found.add(ipaddress.ip_address(each.address))
    return sorted(found, key=lambda address: (not address.is_loopback, address.version, int(address)))


def create(folder: Path, name: str = "modelyard", environment: Sequence[tuple[str, str]] = ()) -> None:
    """Make an authority, a token, and the settings that every node gets.

    Args:
        folder: where; it may exist, but must hold no authority yet.
        name: shown in the certificates.
        environment: variables for every process of the cluster.

    Raises:
        ConfigError: there is an authority already; the name is empty, too long or not printable; or a variable is one
            of `variables`, which would turn off what the certificates are for.
    """
    check_name(name)
    for variable in variables(folder).keys() & dict(environment):
        raise ConfigError(f"--env {variable} would undo what {NODE_ENV} sets on every node", "leave it out")
    if (folder / CA_KEY).exists() or (folder / CA_CERT).exists():
        _trusted(folder)
        raise ConfigError(
            f"{str(folder)!r} holds an authority already",
            "modelyard certs rotate replaces it without a gap; modelyard certs show tells more",
        )
    _make_folder(folder)
    _close(folder)
    certificate, key = new_authority(name)
    _write(folder / CA_KEY, key_pem(key))
    _write(folder / CA_CERT, pem(certificate), 0o644)
    _write(folder / TOKEN, secrets.token_hex(32).encode())
    _write(folder / SETTINGS, _exports(environment))


def set_redis(folder: Path, name: str, address: str, password: str = "", authority: Path | None = None) -> None:
    """Let the head keep the cluster's state in a Redis, so that another machine can take its place.

    Args:
        folder: of the authority.
        name: of the cluster; one Redis can keep several.
        address: `HOST:PORT`, `redis://...`, or `rediss://...` for TLS; the head then shows the node's certificate.
        password: of the Redis.
        authority: who signed the Redis' certificate; by default the cluster's own authority.

    Raises:
        NotFoundError: the folder holds no authority, or there is no such file.
        ConfigError: the address cannot be read, or holds a password; a password would travel in plain text; or that
            file holds no certificate.
    """
    _trusted(folder)
    check_name(name)
    check_redis(address, authority)
    if authority is not None:
        _write(folder / REDIS_CA, _file(authority), 0o644)
    variables = [("RAY_REDIS_ADDRESS", address), ("RAY_external_storage_namespace", name)]
    variables += [("MODELYARD_REDIS_PASSWORD", password)] if password else []
    _write(folder / HEAD_ENV, _exports(variables))


def check_redis(address: str, authority: Path | None = None) -> None:
    """Raise what `set_redis` would raise of these, before anything is written."""
    if authority is not None:
        _file(authority)
        load(authority, "name with --redis-ca the certificate, as PEM, of who signed that of the Redis")
    if "@" in address:
        raise ConfigError("--redis holds a user or a password", "write rediss://HOST:PORT; --redis-password-file")
    scheme, separator, rest = address.partition("://")
    host, colon, port = (rest if separator else address).rpartition(":")
    if (separator and scheme not in ("redis", "rediss")) or not (host and colon and port.isascii() and port.isdigit()):
        raise ConfigError(f"--redis {address!r} is no address", "write rediss://HOST:PORT, or HOST:PORT without TLS")
    if len(port) > len(str(MAX_PORT)) or not 1 <= int(port) <= MAX_PORT:
        raise ConfigError(f"--redis {address!r}: there is no such port", f"give one from 1 to {MAX_PORT}")
    is_here = host in ("127.0.0.1", "localhost", "[::1]")
    if scheme != "rediss" and not is_here:
        raise ConfigError(
            f"--redis {address}: state and password would travel in plain text",
            "write rediss://HOST:PORT; `modelyard certs node` on that machine makes the certificate for it",
        )


def rotate(folder: Path, *, is_last_step: bool = False, also_token: bool = False) -> None:
    """Replace the authority in two steps; meanwhile nodes with old and with new certificates trust each other.

    First step: a new authority; the old one stays trusted. Then every node gets the folder and a new certificate
    (`modelyard up FILE`). Last step: the old authority goes. A first step that was stopped half-way is repeated whole.

    Raises:
        ConfigError: the last step before the first, or before this folder's node has a certificate of the new
            authority; the first step twice; or a new token in the last step.
    """
    if is_last_step and also_token:
        raise ConfigError(
            "--token goes with the first step of a rotation, not with --finish",
            "modelyard certs rotate --finish; then, for a new token: modelyard certs rotate --token",
        )
    trusted = _trusted(folder)
    is_complete = not _key_problem(folder, trusted)[0]
    if is_last_step:
        if len(trusted) == 1:
            raise ConfigError("only one authority is trusted, so there is nothing to finish", "first: certs rotate")
        if not is_complete:
            raise ConfigError(
                f"{CA_KEY} is not the key of the new authority", "first, once more: modelyard certs rotate"
            )
        if (folder / NODE_CERT).exists() and not is_signed_by(load(folder / NODE_CERT)[0], trusted[0]):
            raise ConfigError(
                f"{str(folder / NODE_CERT)!r} is still signed by the old authority",
                "first: modelyard certs node here, and modelyard up FILE for every other node",
            )
        _write(folder / CA_CERT, pem(trusted[0]), 0o644)
        return
    if len(trusted) > 1 and is_complete:
        raise ConfigError(
            "a rotation is under way: two authorities are trusted",
            "give every node its new certificate (modelyard up FILE), then: modelyard certs rotate --finish",
        )
    certificate, key = new_authority(common_name(trusted[0].subject))
    if also_token:
        _write(folder / TOKEN, secrets.token_hex(32).encode())
    _write(folder / CA_CERT, b"".join(map(pem, [certificate, *trusted])), 0o644)
    _write(folder / CA_KEY, key_pem(key))  # last: until then the old key fits an authority that is trusted


def issue(
    folder: Path,
    addresses: Sequence[Address] | None = None,
    authority: Path | None = None,
    days: int = NODE_DAYS,
    *,
    forget: bool = False,
) -> bool:
    """Make this node's certificate and the file of variables that turns TLS and the token on for Ray.

    A certificate that is still good for these addresses is kept.

    Args:
        folder: where they go.
        addresses: that other nodes may call this one by; by default all of its interfaces.
        authority: the folder of the authority, when it is another one.
        days: how long the certificate holds.
        forget: remove the folder's copy of the authority's key afterwards; `authority` names who keeps it.

    Returns:
        Whether a new one was made.

    Raises:
        NotFoundError: the folder holds no authority.
        ConfigError: the authority has expired; its key is junk, of another one, or can be read by others; the folder
            holds another authority's key; or what is to be forgotten is kept nowhere else.
    """
    folder = folder.absolute()  # Ray's processes, which read it from the variables, run elsewhere
    source = folder if authority is None or authority.resolve() == folder.resolve() else authority
    trusted = _trusted(source)
    _check_own_key(folder, source, forget=forget)
    wanted = list(addresses) if addresses is not None else own_addresses()
    _make_folder(folder)
    is_new = not _is_good(folder, trusted[0], wanted)
    if is_new:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = sign(key, *_signer(source, trusted), wanted, days)
        _write(folder / NODE_KEY, key_pem(key))
        _write(folder / NODE_CERT, pem(certificate), 0o644)
    if source != folder:
        _write(folder / CA_CERT, (source / CA_CERT).read_bytes(), 0o644)
        for name in (TOKEN, SETTINGS):
            if (source / name).exists():
                _write(folder / name, (source / name).read_bytes())
    _write(folder / NODE_ENV, _environment(folder).encode())
    if forget:
        (folder / CA_KEY).unlink(missing_ok=True)
    return is_new


def variables(folder: Path) -> dict[str, str]:
    """What Ray must find in its environment on a node with this folder."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / NODE_CERT),
        "RAY_TLS_SERVER_KEY": str(folder / NODE_KEY),
        "RAY_TLS_CA_CERT": str(folder / CA_CERT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_PATIENCE_S),
    }


def token_of(folder: Path) -> str | None:
    """The token in a folder; None when there is none."""
    try:
        return (folder / TOKEN).read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"the token cannot be read: {error}", "run this as its owner") from error


def inspect(folder: Path) -> list[Status]:
    """Every certificate and secret in a folder, with what is wrong with each.

    Raises:
        NotFoundError: the folder holds no authority.
    """
    trusted = _trusted(folder)
    found = [_status(folder / CA_CERT, each, None) for each in trusted]
    if (folder / NODE_CERT).exists():
        found.append(_node_status(folder, trusted))
    for name in SECRET:
        path = folder / name
        if path.exists() or name == TOKEN:
            problem, todo = "", ""
            if path.exists() and not path.is_file():
                problem, todo = "is no file", f"remove it, then: {_remade_by(folder, name)}"
            elif name == NODE_KEY:
                problem, todo = _node_key_problem(folder)
            elif name == CA_KEY:
                problem, todo = _key_problem(folder, trusted)
            elif name == TOKEN and not (path.exists() and _file(path).strip()):
                problem, todo = "is empty" if path.exists() else "is missing", _remade_by(folder, name)
            if path.is_file() and path.stat().st_mode & 0o077:
                problem, todo = f"mode {path.stat().st_mode & 0o777:04o}: others can read it", f"chmod 600 {path}"
            found.append(Status(path, "secret", (), None, problem, todo))
    return found


def _node_status(folder: Path, trusted: Sequence[x509.Certificate]) -> Status:
    path = folder / NODE_CERT
    try:
        certificate = load(path)[0]
    except ConfigError:
        return Status(path, "?", (), None, "is no certificate", "modelyard certs node")
    status = _status(path, certificate, trusted)
    if not (folder / NODE_KEY).exists():
        return replace(status, problem=f"its key, {NODE_KEY}, is missing", todo="modelyard certs node")
    return status


def _remade_by(folder: Path, secret: str) -> str:
    """The command that makes a secret anew."""
    if secret == TOKEN and not (folder / CA_KEY).exists():
        return "modelyard up FILE, from where the cluster was started: it brings the token along"
    command = {
        CA_KEY: "certs rotate",
        TOKEN: "certs rotate --token",
        SETTINGS: "backup restore",
        HEAD_ENV: "certs redis",
    }
    return f"modelyard {command.get(secret, 'certs node')}"


def _node_key_problem(folder: Path) -> tuple[str, str]:
    """What is wrong with the node's key, and what to do; both empty when it is good."""
    key = load_key(folder / NODE_KEY)
    if key is None:
        return "is no key", "modelyard certs node"
    try:
        is_its_key = fits(key, load(folder / NODE_CERT)[0])
    except ConfigError:
        is_its_key = False
    return ("", "") if is_its_key else (f"does not belong to {NODE_CERT}", "modelyard certs node")


def _key_problem(folder: Path, trusted: Sequence[x509.Certificate]) -> tuple[str, str]:
    """What is wrong with the authority's key, and what to do; both empty when it is the newest authority's."""
    key = load_key(folder / CA_KEY)
    if key is None:
        return "is no key of an authority", _NEW_KEY
    if fits(key, trusted[0]):
        return "", ""
    if any(fits(key, each) for each in trusted[1:]):
        return "belongs to the old authority: a rotation was stopped half-way", "modelyard certs rotate"
    return f"belongs to no authority in {CA_CERT}", _NEW_KEY


def _status(path: Path, certificate: x509.Certificate, trusted: Sequence[x509.Certificate] | None) -> Status:
    expires = certificate.not_valid_after_utc
    days, problem, todo = days_until(expires), "", ""
    if days < 0:
        problem, todo = "expired", "modelyard certs rotate" if trusted is None else "modelyard certs node"
    elif is_due(certificate):
        problem, todo = f"expires in {days} days", "modelyard certs " + ("rotate" if trusted is None else "node")
    if trusted is not None and not any(is_signed_by(certificate, each) for each in trusted):
        problem, todo = "signed by another authority, so no other node will talk to this one", "modelyard certs node"
    return Status(path, common_name(certificate.subject), tuple(names_in(certificate)), expires, problem, todo)


def _is_good(folder: Path, authority: x509.Certificate, wanted: Iterable[Address]) -> bool:
    try:
        certificate = load(folder / NODE_CERT)[0]
    except ConfigError:
        return False
    key = load_key(folder / NODE_KEY)
    return (
        key is not None
        and fits(key, certificate)
        and not is_due(certificate)
        and is_signed_by(certificate, authority)
        and {str(each) for each in wanted} <= set(names_in(certificate))
    )


def _trusted(folder: Path) -> list[x509.Certificate]:
    if not (folder / CA_CERT).exists():
        if (folder / CA_KEY).exists():
            raise NotFoundError(f"{str(folder)!r} holds {CA_KEY} without {CA_CERT}", _NEW_AUTHORITY)
        raise NotFoundError(f"no authority in {str(folder)!r}", "modelyard certs create")
    return load(folder / CA_CERT, _NEW_AUTHORITY)


def _signer(folder: Path, trusted: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority whose key is in the folder, and the key."""
    key = _authority_key(folder)
    for certificate in trusted:
        if fits(key, certificate):
            return certificate, key
    raise ConfigError(f"{str(folder / CA_KEY)!r} belongs to no authority in {CA_CERT}", _NEW_KEY)


def _check_own_key(folder: Path, source: Path, *, forget: bool) -> None:
    """Refuse to lose or to mix up an authority's key that lies in a node's folder."""
    own, other = folder / CA_KEY, source / CA_KEY
    if not own.exists():
        return
    if source != folder and not (other.exists() and _file(own) == _file(other)):
        raise ConfigError(f"{str(folder)!r} holds an authority of its own", "name another --folder")
    if source == folder and forget:
        raise ConfigError(
            f"--forget would remove {str(own)!r}, which may be the only one",
            "name where it is kept: --authority FOLDER; or remove this file by hand when another machine has it",
        )


def _authority_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    path = folder / CA_KEY
    if not path.exists():
        raise NotFoundError(
            f"no key of the authority in {str(folder)!r}, so this node's certificate cannot be renewed",
            "modelyard up FILE, from where the cluster was started: it brings the key along",
        )
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"{str(path)!r} can be read by everyone on this machine", f"chmod 600 {path}")
    key = load_key(path)
    if key is None:
        raise ConfigError(f"{str(path)!r} is no elliptic-curve key", _NEW_KEY)
    return key


def _environment(folder: Path) -> str:
    lines = [f"export {name}={quote(value)}" for name, value in variables(folder).items()]
    path = quote(str(folder / SETTINGS))
    return "\n".join([f"if [ -f {path} ]; then . {path}; fi", *lines, ""])  # last: nothing else may turn TLS off


def _exports(variables: Iterable[tuple[str, str]]) -> bytes:
    return "".join(f"export {name}={quote(value)}\n" for name, value in variables).encode()


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{str(path)!r} cannot be read: {error}", "name a file that is there") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"{str(folder)!r} cannot be made: {error}", "name a folder you own") from error


def _close(folder: Path) -> None:
    """Keep others out of a folder that was there already."""
    mode = folder.stat().st_mode
    if mode & stat.S_ISVTX:
        raise ConfigError(f"{str(folder)!r} is a folder that many share", "name a new folder in it")
    try:
        if mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{str(folder)!r} can be read by others: {error}", "name a folder you own") from error


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file at once; nobody else can read it even while it is written."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            path.rmdir()  # an empty one is what a mount of a missing file leaves
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be written: {error}", "name a folder you own") from error
