"""Closing the ports of Ray on machines of your own to all but the machines of the cluster, by nftables.

Mutual TLS and the token refuse strangers, but some ports ask for neither: metrics, health, Serve, and what Gloo and
NCCL open for gradients. The ranges that Ray's workers and the system choose ports from close as a whole, so another
program that listens in 10001-19999 or 32768-65535 is closed to strangers as well; `opened` names the exceptions. All
other ports stay as they are, ssh among them, and so do connections that exist.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Sequence

from modelyard.errors import AccessError, ConfigError, NotFoundError, StartError

TABLE = "modelyard"
PORTS = ("6379", "8000", "8076", "8265", "9000", "10001-19999", "32768-65535")
"""GCS, Serve, objects, dashboard, Serve's gRPC, workers; what the system hands out: agents, raylets, Gloo, NCCL."""
NFT_TIMEOUT_S = 20.0


def rules(addresses: Sequence[str], opened: Sequence[int] = ()) -> str:
    """The rules for `nft -f`: they replace what was there from us, and touch nothing else. Pure.

    Args:
        addresses: of all machines of the cluster.
        opened: ports of `PORTS` that stay open to all, e.g. a gateway with TLS.

    Raises:
        ConfigError: one is no IP address.
    """
    opened = sorted(set(opened))
    lines = [f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{", "  chain input {"]
    lines += ["    type filter hook input priority -5; policy accept;", '    iif "lo" accept']
    lines += ["    ct state established,related accept"]
    families: dict[str, list[str]] = {"ip": [], "ip6": []}
    for address in addresses:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            raise ConfigError(
                f"{address!r} is no IP address, so no rule can be made for it", "list the machines by IP address"
            ) from None
        families["ip" if parsed.version == 4 else "ip6"].append(str(parsed))
    lines += [f"    {family} saddr {{ {', '.join(each)} }} accept" for family, each in families.items() if each]
    lines += [f"    tcp dport {port} accept" for port in opened]
    lines += [f"    tcp dport {{ {', '.join(PORTS)} }} drop", "  }", "}", ""]
    return "\n".join(lines)


def apply(text: str) -> None:
    """Load rules, as root or by `sudo` without a password. They last until `remove` or the next start of the machine.

    Raises:
        NotFoundError: there is no nft.
        AccessError: this user may not.
        StartError: nft refused them, or took longer than NFT_TIMEOUT_S.
    """
    _nft(text)


def remove() -> None:
    """Take our rules away; raises as `apply`."""
    _nft(f"table inet {TABLE}\ndelete table inet {TABLE}\n")


def _nft(text: str) -> None:
    program = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise NotFoundError("this machine has no nft, so its ports stay as they are", "apt install nftables")
    words = [program, "-f", "-"] if os.geteuid() == 0 else ["sudo", "-n", program, "-f", "-"]
    try:
        answer = subprocess.run(words, input=text, capture_output=True, text=True, timeout=NFT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise StartError(
            f"nft did not end within NFT_TIMEOUT_S={NFT_TIMEOUT_S:g} s", "run it by hand, and look"
        ) from None
    except OSError as error:
        raise AccessError(f"the firewall cannot be set: {error}", "run it as root") from error
    if answer.returncode == 0:
        return
    said = answer.stderr.strip()[-500:]
    if "sudo" in said or "not permitted" in said:
        raise AccessError(f"only root may set the firewall: {said}", "run it as root, or allow sudo without a password")
    raise StartError(f"nft refused the rules: {said}", "its message names the line; the ports stay as they were")
