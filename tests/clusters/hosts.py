"""Hosts on one machine: network, mount, process and host-name namespaces with a real sshd each.

A host has its own address, home folder, /tmp, /dev/shm and processes; programs and the repository are shared. Needs
root, `ip`, `unshare`, `nsenter`, `sshd` and `nft`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "rsync", "nft")
NETWORK = "10.78.{site}"
_PYTHON = str(Path(sys.executable).parent)


def why_not() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=path) is None]:
        return f"needs {', '.join(missing)} (apt install iproute2 openssh-server rsync nftables)"
    answer = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return None if answer.returncode == 0 else f"namespaces are not allowed here: {answer.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """One host that runs."""

    number: int
    address: str
    home: Path
    pid: int
    """Of its first process, as seen from outside."""
    interface: str
    """The outside end of its cable."""

    def run(
        self, *command: str, env: Mapping[str, str] = {}, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on it, as root."""
        words = [*self._inside(env), *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)

    def start(self, *command: str, env: Mapping[str, str] = {}) -> subprocess.Popen[bytes]:
        """Start a command on it, as root, and do not wait."""
        silent = subprocess.DEVNULL
        return subprocess.Popen([*self._inside(env), *command], stdin=silent, stdout=silent, stderr=silent)

    def _inside(self, env: Mapping[str, str]) -> list[str]:
        inside = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "-i", "env", "-i", f"HOME={self.home}"]
        inside += [f"PATH={_PYTHON}:/usr/bin:/bin:/usr/sbin:/sbin"]
        return [*inside, *(f"{name}={value}" for name, value in env.items())]

    def processes(self) -> list[str]:
        """Command lines of what runs on it, beside its own first processes."""
        listed = self.run("ps", "-eo", "args", "--no-headers").stdout.splitlines()
        own = ("sshd", "sleep", "bash", "ps ", "sh ")
        return [line for line in listed if line.strip() and not line.strip().startswith(own)]

    def kill(self, name: str, number: int = 9) -> int:
        """Send a signal to its processes whose command line holds `name`; how many there were."""
        found = self.run("pgrep", "-f", name).stdout.split()
        if found:
            self.run("kill", f"-{number}", *found)
        return len(found)

    def cut(self) -> None:
        """Pull its cable."""
        subprocess.run(["ip", "link", "set", self.interface, "down"], check=True)

    def heal(self) -> None:
        """Plug it in again."""
        subprocess.run(["ip", "link", "set", self.interface, "up"], check=True)


@dataclass(frozen=True)
class Hosts:
    """All of them, and the key that opens each."""

    members: Sequence[Host]
    key: Path
    bridge: str

    def __getitem__(self, number: int) -> Host:
        return self.members[number]


@contextlib.contextmanager
def hosts(count: int, folder: Path) -> Iterator[Hosts]:
    """Make hosts for as long as the context lasts; nothing of them is left after it."""
    start = os.getpid()
    site = next(number for each in range(200) if not _exists(f"mybr{(number := (start + each) % 200 + 20)}"))
    network, bridge = NETWORK.format(site=site), f"mybr{site}"
    key = folder / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    made: list[Host] = []
    with contextlib.ExitStack() as undo:
        undo.callback(_quietly, "ip", "link", "del", bridge)
        _checked("ip", "link", "add", bridge, "type", "bridge")
        _checked("ip", "addr", "add", f"{network}.254/24", "dev", bridge)
        _checked("ip", "link", "set", bridge, "up")
        for number in range(1, count + 1):
            made.append(_make(number, f"my{site}n", network, bridge, folder, key, undo))
        yield Hosts(made, key, bridge)


def _make(
    number: int, prefix: str, network: str, bridge: str, folder: Path, key: Path, undo: contextlib.ExitStack
) -> Host:
    home, address = folder / f"n{number}" / "home", f"{network}.{number}"
    name, cable = f"{prefix}{number}", f"{prefix}{number}v"
    _furnish(home, network, address, key)
    _quietly("ssh-keygen", "-R", address)  # ssh remembers the keys of hosts that were here before
    undo.callback(_quietly, "ssh-keygen", "-R", address)
    undo.callback(_quietly, "ip", "netns", "del", name)
    _checked("ip", "netns", "add", name)
    _checked("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    _checked("ip", "link", "set", cable, "master", bridge, "up")
    for words in (
        ["addr", "add", f"{address}/24", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
    ):
        _checked("ip", "-n", name, *words)
    _checked("ip", "-n", name, "route", "add", "default", "via", f"{network}.254")
    first = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", name]
    first += ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child"]
    first += ["--propagation", "private", "bash", str(home.parent / "init.sh")]
    with (home.parent / "init.log").open("wb") as log:
        process = subprocess.Popen(first, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    undo.callback(_end, process)
    deadline = time.monotonic() + 20
    while not (home.parent / "sshd.pid").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((home.parent / "init.log").read_text() + (home.parent / "sshd.log").read_text())
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Host(number, address, home, int(children[0]), cable)


def _furnish(home: Path, network: str, address: str, key: Path) -> None:
    """Everything the first process of a host reads: passwd, host key, sshd's settings, a shell profile."""
    here = home.parent
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (here / "tmp").mkdir()
    (home / ".ssh" / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(here / "hostkey")], check=True)
    lines = Path("/etc/passwd").read_text().splitlines()
    root = [f"root:x:0:0:root:{home}:/bin/bash" if line.startswith("root:") else line for line in lines]
    (here / "passwd").write_text("\n".join(root) + "\n")
    names = [f"{network}.{each} host{each}" for each in range(1, 30)]
    (here / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
    profile = f"export PATH={_PYTHON}:$PATH RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1\n"
    (home / ".bashrc").write_text(profile)
    (home / ".profile").write_text(profile)
    settings = {
        "ListenAddress": address,
        "HostKey": here / "hostkey",
        "AuthorizedKeysFile": home / ".ssh" / "authorized_keys",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": here / "sshd.pid",
        "Subsystem": "sftp internal-sftp",
        "MaxStartups": 100,
        "MaxSessions": 100,
    }
    (here / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    # /tmp/ray is the host's own; the rest of /tmp is shared, since a checkout or its environment may be below it
    (here / "init.sh").write_text(
        "set -e\n"
        "mount --make-rprivate /\n"
        f"mkdir -p /tmp/ray /run/sshd\nmount --bind {here}/tmp /tmp/ray\n"
        "mount -t tmpfs -o size=1g tmpfs /dev/shm\n"
        f"mount --bind {here}/passwd /etc/passwd\n"
        f"mount --bind {here}/hosts /etc/hosts\n"
        f"hostname host{address.rpartition('.')[2]}\n"
        f"$(command -v sshd || echo /usr/sbin/sshd) -f {here}/sshd_config -E {here}/sshd.log\n"
        "while :; do sleep 3600 & wait $! || true; done\n"
    )


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the host's first process goes with it, and so do all the others
    process.wait(20)


def _checked(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _quietly(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)
