"""What `modelyard doctor --cluster` looks at: whether a stranger could use, or read along with, the cluster here."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from modelyard.cli.doctor_checks import Finding

TIMEOUT_S = 3.0
REFUSED = (401, 403)
_RAY = ("ray", "gcs_server", "raylet", "plasma")


@dataclass(frozen=True)
class Door:
    """A port on which a process of Ray listens."""

    port: int
    process: str
    is_public: bool
    """Whether it is open on more than the loopback interface."""
    status: int | None = None
    """What an HTTP call without a token got; None when it got no HTTP answer."""
    host: str = "127.0.0.1"
    """An address at which it listens."""


@dataclass(frozen=True)
class Exposure:
    """What was found out about a cluster from this machine."""

    dashboard: str
    dashboard_status: int | None
    """What its job list answered to a call without a token."""
    gcs: str = ""
    gcs_is_tls: bool | None = None
    """None when nothing answered."""
    is_one_machine: bool = False
    is_named: bool = False
    """Whether somebody named the dashboard; else it is a guess."""
    doors: Sequence[Door] = ()
    certificates: Sequence[tuple[str, str, str]] = ()
    """File, problem, what to do; of those with a problem."""
    has_certificates: bool = False


def findings(exposure: Exposure) -> list[Finding]:
    """Judge it. Pure."""
    return [*_dashboard(exposure), *_wire(exposure), *_doors(exposure), *_certificates(exposure)]


def gather(dashboard: str, gcs: str, *, is_one_machine: bool, is_named: bool = False) -> Exposure:
    """Knock, without a token, at the dashboard and at every port of Ray on this machine. Takes some seconds."""
    from modelyard.clusters import certs
    from modelyard.errors import ModelyardError

    try:
        statuses = certs.inspect(certs.default_folder())
    except ModelyardError:
        statuses = []
    with ThreadPoolExecutor(16) as pool:
        doors = list(pool.map(_knocked, _listening()))
    return Exposure(
        dashboard=dashboard,
        dashboard_status=_status(f"{dashboard.rstrip('/')}/api/jobs/"),
        gcs=gcs,
        gcs_is_tls=_speaks_tls(gcs) if gcs else None,
        is_one_machine=is_one_machine,
        is_named=is_named,
        doors=doors,
        certificates=[(each.file.name, each.problem, each.todo) for each in statuses if each.problem],
        has_certificates=bool(statuses),
    )


def _dashboard(exposure: Exposure) -> Iterator[Finding]:
    status, url = exposure.dashboard_status, exposure.dashboard
    if status is None:
        todo = "is the address right?" if exposure.is_named else "name it: modelyard doctor --cluster --address URL"
        yield Finding("dashboard", "fail" if exposure.is_named else "warn", f"{url} does not answer", todo)
    elif status in REFUSED:
        yield Finding("dashboard", "ok", f"{url} asks for a token")
    else:
        todo = "stop the cluster, then start it with RAY_AUTH_MODE=token (modelyard up does; see modelyard certs)"
        yield Finding("dashboard", "fail", f"{url} is open: whoever reaches it can run code as you", todo)
    parts = urlsplit(url)
    if status is not None and parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        todo = "start Ray with --dashboard-host=127.0.0.1 and come through ssh: modelyard submit --cluster FILE"
        yield Finding("dashboard wire", "fail", f"{url} is plain HTTP: the token can be read on its way", todo)


def _wire(exposure: Exposure) -> Iterator[Finding]:
    if exposure.gcs_is_tls is None:
        return
    if exposure.gcs_is_tls:
        yield Finding("traffic", "ok", f"{exposure.gcs} speaks TLS")
    elif exposure.is_one_machine:
        if count := sum(door.is_public for door in exposure.doors):
            problem = f"in plain text; {count} of Ray's ports can be reached from other machines, by who has the token"
            yield Finding("traffic", "warn", problem, "keep others out with this machine's firewall")
        else:
            yield Finding("traffic", "ok", "in plain text, on this machine only")
    else:
        todo = "modelyard certs create, and start the nodes with the variables that modelyard certs node writes"
        yield Finding("traffic", "fail", f"{exposure.gcs} speaks plain text: data and token can be read", todo)


def _doors(exposure: Exposure) -> Iterator[Finding]:
    public = [door for door in exposure.doors if door.is_public]
    refusing = [door for door in public if door.status in REFUSED]
    silent = [door for door in public if door.status is None]
    for door in public:
        if door in refusing or door in silent:
            continue
        todo = "let only the cluster in: modelyard cluster firewall FILE --apply, or the cloud's security group"
        yield Finding(f"port {door.port}", "warn", f"{door.process} answers anyone with status {door.status}", todo)
    yield Finding("other ports", "ok", f"{len(refusing)} refuse a stranger, {len(silent)} do not speak HTTP")


def _certificates(exposure: Exposure) -> Iterator[Finding]:
    for file, problem, todo in exposure.certificates:
        yield Finding(file, "fail" if "expired" in problem or "mode" in problem else "warn", problem, todo)
    if not exposure.certificates and exposure.has_certificates:
        yield Finding("certificates", "ok", "valid, and their keys are yours alone")


def _listening() -> list[Door]:
    import psutil  # type: ignore[import-untyped]

    found: dict[int, Door] = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            name = words[0].rpartition("/")[2] if words else ""
            if not any(mark in " ".join(words[:3]) for mark in _RAY):
                continue
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    port, host = connection.laddr.port, connection.laddr.ip
                    here = "127.0.0.1" if host in ("0.0.0.0", "::") else host
                    found[port] = Door(port, name[:40], not _is_loopback(host), host=here)
        except (psutil.Error, OSError):
            continue  # it is another user's, or has ended
    return sorted(found.values(), key=lambda door: door.port)


def _knocked(door: Door) -> Door:
    host = f"[{door.host}]" if ":" in door.host else door.host
    return replace(door, status=_status(f"http://{host}:{door.port}/"))


def _status(url: str) -> int | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None
    except Exception:  # noqa: BLE001  whatever a port that is not HTTP makes the parser raise
        return None


def _speaks_tls(address: str) -> bool | None:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as plain:
            plain.settimeout(TIMEOUT_S)
            try:
                with context.wrap_socket(plain) as wrapped:
                    return wrapped.version() is not None
            except ssl.SSLError as error:
                return "CERTIFICATE_REQUIRED" in str(error) or "HANDSHAKE_FAILURE" in str(error)
            except OSError:
                return False
    except (OSError, ValueError):
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
