"""Refuse files that could run code when they are read: pickles, in whatever wrapping.

A file is judged by its name and by its content. The content check walks pickle opcodes without running them
(`pickletools`), looks into zip and tar archives (torch writes pickles inside zips), through gzip, zlib, bz2 and
xz (joblib), and into the header of `.npy` files (object arrays are pickles).
"""

from __future__ import annotations

import ast
import bz2
import importlib.util
import io
import lzma
import pickletools
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modelyard.errors import UnsafeFileError

UNSAFE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".cloudpickle", ".pyc"})
_WINDOW_BYTES = 1 << 20
_MAX_OPCODES = 20_000
_MAX_MEMBERS = 20_000
_MAX_DEPTH = 3
_IMPORTS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
_CALLS = frozenset({"REDUCE", "BUILD", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"})
_LEGACY_MODULES = frozenset({"__builtin__", "copy_reg", "commands", "torch", "numpy", "joblib"})


def refuse_unsafe(path: Path, name: str) -> None:
    """Check one file; `name` is how the error calls it.

    Raises:
        UnsafeFileError: it is a pickle, holds one, or is named like one.
    """
    reason = unsafe_name(name)
    if reason is None:
        with path.open("rb") as file:
            reason = unsafe_content(file)
    if reason is not None:
        raise UnsafeFileError(f"file {name!r} {reason}: reading it could run code", conversion(name))


def refuse_unsafe_name(name: str) -> None:
    """Check a file by its name alone, before its content is at hand.

    Raises:
        UnsafeFileError: it is named like a pickle.
    """
    reason = unsafe_name(name)
    if reason is not None:
        raise UnsafeFileError(f"file {name!r} {reason}: reading it could run code", conversion(name))


def conversion(name: str) -> str:
    """How to turn the file into one that is safe."""
    if name.lower().endswith((".npy", ".npz")):
        return "save the array with a number or string dtype (np.save(..., allow_pickle=False)), or as Parquet"
    target = Path(name).with_suffix(".safetensors").name
    return (
        "convert it to safetensors, where you trust it:\n"
        '     python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{Path(name).name}', weights_only=True), '{target}')\"\n"
        "     or, for a Hugging Face model: model.save_pretrained(folder, safe_serialization=True)"
    )


def unsafe_name(name: str) -> str | None:
    """Why a file of this name is refused unseen, or None."""
    suffix = Path(name.lower()).suffix
    return f"is named like a pickle ({suffix})" if suffix in UNSAFE_SUFFIXES else None


def unsafe_content(file: BinaryIO, depth: int = 0) -> str | None:
    """Why the content is refused, or None. Reads about 1 MiB of it, and the directory of an archive."""
    head = file.read(_WINDOW_BYTES)
    reason = _unsafe_bytes(head)
    if reason is not None or depth >= _MAX_DEPTH:
        return reason
    for member, content in _members(file, head):
        if unsafe_name(member) is not None or Path(member).name == "pickle":
            return f"is an archive that holds the pickle {member!r} (torch.save writes such files)"
        inner = unsafe_content(io.BytesIO(content), depth + 1)
        if inner is not None:
            return f"holds {member!r}, which {inner}"
    unpacked = _decompress(head)
    if unpacked:
        inner = unsafe_content(io.BytesIO(unpacked), depth + 1)
        return f"is compressed, and inside {inner}" if inner is not None else None
    return None


def _unsafe_bytes(head: bytes) -> str | None:
    if head.startswith(b"\x93NUMPY"):
        return "is a NumPy file of Python objects" if _npy_holds_objects(head) else None
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"is a pickle (protocol {head[1]})" if _runs_as_pickle(head, has_magic=True) else None
    return "is a pickle (protocol 0 or 1)" if _runs_as_pickle(head, has_magic=False) else None


def _runs_as_pickle(head: bytes, *, has_magic: bool) -> bool:
    """Whether the unpickler would get as far as a call or the end. Nothing is executed.

    Other data (a safetensors header, token ids) meets an invalid opcode long before. Protocols 0 and 1 have no
    magic number and look like text, so there an import of a known module followed by a call is asked for.
    """
    imported = called = False
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(head)):
            count += 1
            imported |= opcode.name in _IMPORTS and _is_known_module(argument)
            called |= opcode.name in _CALLS and (imported or has_magic)
            if called or count >= _MAX_OPCODES:
                return called or has_magic
            if opcode.name == "STOP":
                return count > 1 and has_magic
    except (ValueError, struct.error, UnicodeError, OverflowError):
        pass  # not a valid opcode, or the window ended inside an argument
    return has_magic and len(head) >= _WINDOW_BYTES and count >= 3


def _is_known_module(argument: object) -> bool:
    """Whether a GLOBAL's "module name" argument can be imported; imports by other opcodes always count."""
    if not isinstance(argument, str):
        return True
    top = argument.split(" ")[0].split(".")[0]
    return top in sys.stdlib_module_names or top in _LEGACY_MODULES or (top.isidentifier() and _is_installed(top))


def _is_installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _npy_holds_objects(head: bytes) -> bool:
    try:
        wide = head[6] >= 2
        length = struct.unpack("<I" if wide else "<H", head[8 : 12 if wide else 10])[0]
        start = 12 if wide else 10
        header = ast.literal_eval(head[start : start + length].decode("utf-8" if head[6] >= 3 else "latin1"))
        return "O" in repr(header["descr"])
    except (
        ValueError,
        SyntaxError,
        KeyError,
        IndexError,
        TypeError,
        struct.error,
        MemoryError,
        RecursionError,
    ):
        return True  # a header that cannot be read is not given the benefit of the doubt


def _members(file: BinaryIO, head: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and first MiB of each member, if the file is a zip (even behind other data) or a tar."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist()[:_MAX_MEMBERS]:
                    encrypted = info.flag_bits & 1
                    if info.is_dir() or encrypted:
                        continue
                    with archive.open(info) as member:
                        yield info.filename, member.read(_WINDOW_BYTES)
        elif head[257:262] == b"ustar":
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for index, entry in enumerate(tar):
                    content = tar.extractfile(entry) if entry.isfile() else None
                    if content is not None:
                        yield entry.name, content.read(_WINDOW_BYTES)
                    if index >= _MAX_MEMBERS:
                        return
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        ValueError,
    ):
        return  # not an archive after all, or one that no loader could read either


def _decompress(head: bytes) -> bytes:
    """The first MiB of compressed content; empty when the head is not compressed."""
    try:
        if head.startswith((b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")):
            return zlib.decompressobj(wbits=47).decompress(head, _WINDOW_BYTES)
        if head.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(head, _WINDOW_BYTES)
        if head.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
            return lzma.LZMADecompressor().decompress(head, _WINDOW_BYTES)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError):
        pass  # the magic number was a coincidence
    return b""
