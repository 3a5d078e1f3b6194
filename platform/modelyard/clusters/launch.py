"""Starting and stopping what a `ray up` file describes: Ray's launcher, after our checks and with its traps closed."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modelyard.clusters.certs import CA_CERT, CA_KEY, default_folder, inspect
from modelyard.clusters.check import check
from modelyard.clusters.files import ClusterFile, listed, section
from modelyard.errors import AccessError, ConfigError, NotFoundError, StartError, UnavailableError

SSH_TIMEOUT_S = 10
LAUNCHER_TIMEOUT_S = 3600.0
"""For one `ray up`, `ray down` or `ray exec`: machines that boot and install take many minutes."""
HEAD_IP_TIMEOUT_S = 120.0
"""For the cloud's answer to where the head is."""
_SECURE = ".modelyard/cluster"
STOP = (
    "pkill -f '[r]ay start --address'; ray stop --grace-period 5; "
    "modelyard cluster firewall --remove 2> /dev/null || true"
)
"""A start that is on its way, as by the autoscaler, ends first: it would come after the stop. `[r]` leaves this out."""
RELEASE = ". ~/.modelyard/cluster/node.env; modelyard cluster keep-head --stop --forget"
_VERSION = "import importlib.metadata as m; print(m.version('ray'))"


def up(
    file: ClusterFile, say: Callable[[str], None], *, restart: bool = True, timeout_s: float = LAUNCHER_TIMEOUT_S
) -> None:
    """Check the file, then start the head and, through it, the other nodes.

    Raises:
        ConfigError: the file cannot work, or is none for `ray up`; the certificates have expired; or a machine of its
            own has another Ray.
        NotFoundError: the certificates it brings to the nodes are not made yet.
        AccessError, UnavailableError: a machine of its own refuses the key, or does not answer.
        StartError: Ray's launcher failed, or took longer than `timeout_s`; its output says where.
    """
    _refuse_manifest(file, "apply")
    errors = [problem for problem in check(file) if problem.level == "error"]
    if errors:
        raise ConfigError("\n".join(map(str, errors)), f"modelyard cluster check {file.path} shows all of it")
    mounted = section(file.data, "file_mounts").values()
    if any(_SECURE in str(local) or Path(str(local)).expanduser() == default_folder() for local in mounted):
        _refuse_bad_certificates()
    if file.kind == "local":
        say("asking each machine for its Ray and its key ...")
        greet(file)
    options = ["--no-config-cache"] if restart else ["--no-restart", "--no-config-cache"]
    _launcher(file, "up", *options, limit=("--start-timeout-s", timeout_s))


def down(file: ClusterFile, say: Callable[[str], None], timeout_s: float = LAUNCHER_TIMEOUT_S) -> None:
    """Stop what `up` started. On machines of your own, wait until each of them is rid of Ray.

    Raises:
        ConfigError: the file is none for `ray up`.
        StartError: Ray's launcher failed, or took longer than `timeout_s`.
    """
    _refuse_manifest(file, "delete")
    limit = ("--timeout-s", timeout_s)
    _let_go(file, say, limit)
    _launcher(file, "down", limit=limit)
    if file.kind == "local":
        say("ending what is left on each machine ...")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda address: run_on(file, address, STOP), addresses(file)))


def _let_go(file: ClusterFile, say: Callable[[str], None], limit: tuple[str, float]) -> None:
    """End the process that would start the head again, and remove the kept state: the next `up` is a new cluster."""
    if "keep-head" not in " ".join(map(str, file.data.get("head_start_ray_commands") or [])):
        return
    say("ending what keeps the head ...")
    try:
        if file.kind == "local":
            run_on(file, head_address(file), RELEASE)
        else:
            head_address(file)
            _launcher(file, "exec", after=(RELEASE,), limit=limit)
    except (NotFoundError, StartError, UnavailableError) as error:
        say(f"the head did not answer, so its state may be kept: {error.problem}")


def greet(file: ClusterFile) -> None:
    """Reach every machine of the file by ssh, before anything is changed on one, and compare its Ray with ours.

    Raises:
        AccessError: one refuses the key.
        UnavailableError: one does not answer.
        ConfigError: one has another Ray, and the file's setup_commands install none.
    """
    everyone = addresses(file)
    ask = f"command -v ray > /dev/null && python -c {shlex.quote(_VERSION)} || true"
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda address: run_on(file, address, ask), everyone))
    own = importlib.metadata.version("ray")
    found = {address: text.split()[-1] for address, text in zip(everyone, said, strict=True) if text.strip()}
    others = {address: version for address, version in found.items() if version != own}
    installs = any("pip install" in str(command) for command in file.data.get("setup_commands") or [])
    if others and not installs:
        each = ", ".join(f"{address} has {version}" for address, version in others.items())
        raise ConfigError(f"Ray is {own} here, but {each}", f"on each of them: pip install ray=={own}")


def addresses(file: ClusterFile) -> list[str]:
    """The machines of a file of provider `local`, the head first.

    Raises:
        ConfigError: it names no head.
    """
    provider = section(file.data, "provider")
    if provider.get("head_ip") is None:
        raise ConfigError(f"{str(file.path)!r}: provider.head_ip is missing", "give the head's IP address")
    return [str(provider["head_ip"]), *map(str, listed(provider, "worker_ips", "provider"))]


def head_address(file: ClusterFile) -> str:
    """Where the head is; asks the cloud when the file does not say.

    Raises:
        NotFoundError: it is not up.
        UnavailableError: the cloud did not answer within HEAD_IP_TIMEOUT_S.
    """
    if file.kind == "local":
        return addresses(file)[0]
    words = [*_RAY, "get-head-ip", str(file.path)]
    limit = HEAD_IP_TIMEOUT_S
    try:
        answer = subprocess.run(
            words, capture_output=True, text=True, env=_environment(file), timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        problem = f"ray get-head-ip {file.path} did not end within HEAD_IP_TIMEOUT_S={limit:g} s"
        raise UnavailableError(problem, "is the cloud reachable, and are its credentials right?") from None
    words = answer.stdout.split()
    if answer.returncode != 0 or not words:
        raise NotFoundError(f"the cluster of {file.path} is not up", f"modelyard up {file.path}")
    return words[-1]


def run_on(file: ClusterFile, address: str, command: str, timeout_s: float = 120.0) -> str:
    """Run a command on one machine, as Ray's launcher would: in a login shell of the file's user. Its output.

    Raises:
        AccessError: the machine refuses the key.
        UnavailableError: it does not answer, or the command failed or took too long.
    """
    line = shlex.join(["bash", "--login", "-c", f"[ -f ~/.bashrc ] && . ~/.bashrc; {command}"])
    try:
        answer = subprocess.run(
            [*ssh_command(file), "--", target(file, address), line],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{address} did not finish {command!r} in {timeout_s:g} s", "look at it") from None
    if answer.returncode == 255:
        raise refusal(file, address, answer.stderr)
    if answer.returncode != 0:
        last = (answer.stderr.strip() or answer.stdout.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        raise UnavailableError(f"{address}: {command!r} failed: {last}", "log in and look")
    return answer.stdout


def ssh_command(file: ClusterFile, *options: str) -> list[str]:
    """`ssh` with the file's key; never asks a question, and learns the key of a machine it meets for the first time."""
    key = section(file.data, "auth").get("ssh_private_key")
    given = ["BatchMode=yes", f"ConnectTimeout={SSH_TIMEOUT_S}", "StrictHostKeyChecking=accept-new", "LogLevel=ERROR"]
    words = ["ssh", *options]
    for option in given:
        words += ["-o", option]
    return [*words, *(["-i", str(Path(str(key)).expanduser()), "-o", "IdentitiesOnly=yes"] if key else [])]


def target(file: ClusterFile, address: str) -> str:
    """`user@address`, as the file has it."""
    user = section(file.data, "auth").get("ssh_user")
    return f"{user}@{address}" if user else address


def refusal(file: ClusterFile, address: str, said: str) -> AccessError | UnavailableError:
    """The error for what ssh said when it did not get in."""
    lines = said.strip().splitlines()
    words = lines[-1] if lines else "no answer"
    auth = section(file.data, "auth")
    if "Permission denied" in said:
        key = auth.get("ssh_private_key", "ssh's own")
        return AccessError(
            f"{address} refuses user {auth.get('ssh_user')!r} with the key {key}", "see auth in the file"
        )
    if "host key" in said.lower() or "REMOTE HOST IDENTIFICATION" in said:
        todo = f"if the machine was set up anew: ssh-keygen -R {address}"
        return AccessError(f"{address} is not the machine it was: its host key has changed", todo)
    return UnavailableError(f"{address} cannot be reached by ssh: {words}", "is it up, and is port 22 open to you?")


_RAY = (sys.executable, "-m", "ray.scripts.scripts")


def _launcher(
    file: ClusterFile, command: str, *options: str, limit: tuple[str, float], after: Sequence[str] = ()
) -> None:
    """Run a command of Ray's launcher; `limit` is the setting that ends it, and its seconds."""
    started = time.monotonic()
    sure = ["-y"] if command in ("up", "down") else []
    words: Sequence[str] = [*_RAY, command, *sure, *options, str(file.path), *after]
    setting, seconds = limit
    try:
        answer = subprocess.run(words, env=_environment(file), stdin=subprocess.DEVNULL, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        problem = f"ray {command} {file.path} did not end within {setting}={seconds:g} s"
        raise StartError(problem, "its output above says where it stands") from None
    code = answer.returncode
    if code != 0:
        seconds = time.monotonic() - started
        raise StartError(f"ray {command} {file.path} failed after {seconds:.0f} s", "its output above says where")


def _environment(file: ClusterFile) -> dict[str, str]:
    """Ray's new autoscaler leaves out one of the machines of provider `local`, so that one gets the old."""
    old = {"RAY_UP_enable_autoscaler_v2": "0"} if file.kind == "local" else {}
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **old}


def _refuse_bad_certificates() -> None:
    if not (default_folder() / CA_KEY).exists():
        raise NotFoundError(f"no certificates in {default_folder()}", "modelyard certs create")
    for status in inspect(default_folder()):
        if status.file.name == CA_CERT and status.problem == "expired":
            raise ConfigError(f"the authority in {default_folder()} has expired", "modelyard certs rotate")


def _refuse_manifest(file: ClusterFile, verb: str) -> None:
    if file.kind == "kuberay":
        raise ConfigError(f"{str(file.path)!r} is a KubeRay manifest", f"kubectl {verb} -f {file.path}")
