"""X.509: an authority, what it signs, and what is in a certificate. Knows no folder and no cluster."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from modelyard.errors import ConfigError

CA_DAYS = 5 * 365
RENEW_BEFORE_DAYS = 30
"""A certificate is renewed this long before its end, or in the last third of its life when that is shorter."""
MAX_NAME_BYTES = 64
"""Of a name in a certificate (X.520)."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_name(name: str) -> None:
    """Raise ConfigError for a `--name` that no certificate can hold."""
    if not name.isprintable():
        raise ConfigError(f"--name {name!r} has a character that cannot be printed", "give letters, digits, - or _")
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise ConfigError(
            f"--name has {len(name.encode())} bytes", f"give a name of 1 to {MAX_NAME_BYTES} characters (ASCII)"
        )


def new_authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """An authority of its own, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    uses = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(uses, critical=True)
    )
    return builder.sign(key, hashes.SHA256()), key


def sign(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    addresses: Sequence[Address],
    days: int,
) -> x509.Certificate:
    """A certificate for this machine under some addresses, to serve and to call with.

    Raises:
        ConfigError: the authority has expired.
    """
    left = days_until(authority.not_valid_after_utc)
    if left < 1:
        raise ConfigError("the cluster's authority has expired", "modelyard certs rotate, then modelyard up FILE")
    host = socket.gethostname()[:64] or "node"
    names: list[x509.GeneralName] = [x509.IPAddress(address) for address in addresses]
    names += [x509.DNSName(each) for each in dict.fromkeys(("localhost", host)) if each.isascii()]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(subject, authority.subject, key.public_key(), min(days, left))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - dt.timedelta(hours=1))  # clocks of nodes differ
        .not_valid_after(now() + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def load(path: Path, todo: str = "modelyard certs node makes a new one") -> list[x509.Certificate]:
    """The certificates in a file, at least one."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no certificate: {error}", todo) from error


def load_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """The key in a file; None when there is none, or something else."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, OSError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def fits(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    """Whether it is the certificate's key."""
    try:
        return key.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether this authority signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def is_due(certificate: x509.Certificate) -> bool:
    """Whether it is time to renew it."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - now() < min(dt.timedelta(days=RENEW_BEFORE_DAYS), life / 3)


def names_in(certificate: x509.Certificate) -> Iterator[str]:
    """The addresses and host names that it holds for."""
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        yield from map(str, extension.get_values_for_type(x509.IPAddress))
        yield from extension.get_values_for_type(x509.DNSName)


def common_name(name: x509.Name) -> str:
    """The common name; `modelyard` when there is none."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else "modelyard"


def pem(certificate: x509.Certificate) -> bytes:
    """As a file has it."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """As a file has it, not encrypted."""
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def days_until(moment: dt.datetime) -> int:
    """Whole days until then; negative when it is over."""
    return (moment - now()).days


def now() -> dt.datetime:
    """The time by this machine's clock, in UTC."""
    return dt.datetime.now(dt.UTC)
