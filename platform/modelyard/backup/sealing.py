"""Keys of a backup, and sealing: AES-256-GCM over pieces whose names tell nothing about what is in them.

One master key (a file, or a passphrase stretched by scrypt) gives two by HKDF (RFC 5869): one encrypts, the other names
the pieces by HMAC of their content. Equal pieces get equal names, which is what makes a backup incremental, and nobody
without the key can tell whether a known file is in it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from modelyard.errors import ConfigError, IntegrityError, NotFoundError

KEY_BYTES = 32
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""What sealing adds: the nonce, and the tag of AES-GCM."""
ENV_PASSPHRASE = "MODELYARD_BACKUP_PASSPHRASE"
MIN_PASSPHRASE = 12
_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}


@dataclass(frozen=True)
class Sealer:
    """Seals and opens the pieces of one backup."""

    _cipher: AESGCM = field(repr=False)
    _naming: bytes = field(repr=False)

    @classmethod
    def of(cls, master: bytes) -> Sealer:
        """The sealer of a master key of 32 bytes."""
        keys = HKDF(hashes.SHA256(), 2 * KEY_BYTES, None, b"modelyard backup v1").derive(master)
        return cls(AESGCM(keys[:KEY_BYTES]), keys[KEY_BYTES:])

    def name(self, content: bytes) -> str:
        """The name of a piece: 64 hexadecimal digits, equal for equal content."""
        return hmac.new(self._naming, content, hashlib.sha256).hexdigest()

    def seal(self, name: str, content: bytes) -> bytes:
        """Encrypt; the result opens under this name only."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, name.encode())

    def open(self, name: str, sealed: bytes) -> bytes:
        """Decrypt and authenticate.

        Raises:
            IntegrityError: it was changed, cut short, put under another name, or sealed with another key.
        """
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise IntegrityError(f"piece {name[:12]} is damaged, or was made with another key", "") from None


def master_key(key_file: Path, salt: bytes, *, make: bool) -> bytes:
    """The master key: from the passphrase in `MODELYARD_BACKUP_PASSPHRASE` when that is set, else from a file.

    Args:
        key_file: holds 64 hexadecimal digits.
        salt: of the backup; used with a passphrase.
        make: make the file when it is absent.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is a folder, can be read by others, holds no key, or the passphrase is short.
    """
    if passphrase := os.environ.get(ENV_PASSPHRASE):
        if len(passphrase) < MIN_PASSPHRASE:
            raise ConfigError(f"{ENV_PASSPHRASE} has {len(passphrase)} characters", f"use {MIN_PASSPHRASE} or more")
        return Scrypt(salt=salt, length=KEY_BYTES, **_SCRYPT).derive(passphrase.encode())
    if key_file.is_dir():
        raise ConfigError(
            f"the key file {str(key_file)!r} is a folder", f"name the file, e.g. {key_file / 'backup.key'}"
        )
    if not key_file.exists():
        if not make:
            todo = f"bring it from where the backup was made, or set {ENV_PASSPHRASE}"
            raise NotFoundError(f"no key file {str(key_file)!r}", todo)
        key_file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(KEY_BYTES) + "\n")
    if key_file.stat().st_mode & 0o077:
        raise ConfigError(f"{str(key_file)!r} can be read by others", f"chmod 600 {key_file}")
    try:
        key = bytes.fromhex(key_file.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{str(key_file)!r} holds no key", f"it must hold {2 * KEY_BYTES} hexadecimal digits")
    return key
