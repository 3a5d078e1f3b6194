from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.artifacts.unsafe import refuse_unsafe, unsafe_content
from modelyard.errors import UnsafeFileError


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


PAYLOADS = {"data": {"weights": [1.0, 2.0]}, "array": np.arange(4), "code": Evil()}


def torch_zip() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def torch_legacy() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def numpy_bytes(array: np.ndarray, save: object = np.save) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)  # type: ignore[operator]
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("model_weights")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(content: bytes, name: str = "weights") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def check(content: bytes, tmp_path: Path, name: str = "weights.bin") -> None:
    (tmp_path / "file").write_bytes(content)
    refuse_unsafe(tmp_path / "file", name)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_modern_protocol_are_refused(payload: str, protocol: int, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match=rf"'weights.bin' is a pickle \(protocol {protocol}\)") as raised:
        check(pickle.dumps(PAYLOADS[payload], protocol), tmp_path)
    assert "save_file(" in raised.value.todo


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_that_run_code_are_refused(protocol: int, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="protocol 0 or 1"):
        check(pickle.dumps(Evil(), protocol), tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_breaks_off_after_its_call_is_refused(protocol: int, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError):
        check(pickle.dumps(Evil(), protocol)[:-1] + b"\xff\xff", tmp_path)


def test_a_call_behind_megabytes_of_harmless_opcodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError):
        check(pickle.dumps([bytes(3 << 20), Evil()], 4), tmp_path)
    with pytest.raises(UnsafeFileError):
        check(pickle.dumps([list(range(100_000)), Evil()], 2), tmp_path)


EVIL = pickle.dumps(Evil(), 4)
WRAPPED = {
    "torch zip": torch_zip,
    "torch legacy": torch_legacy,
    "gzip": lambda: gzip.compress(EVIL),
    "zlib": lambda: zlib.compress(EVIL),
    "bz2": lambda: bz2.compress(EVIL),
    "xz": lambda: lzma.compress(EVIL),
    "lzma": lambda: lzma.compress(EVIL, lzma.FORMAT_ALONE),
    "tar": lambda: tarred(EVIL),
    "tar.gz": lambda: gzip.compress(tarred(EVIL)),
    "zip without a telling name": lambda: zipped(EVIL),
    "zip in zip": lambda: zipped(zipped(EVIL)),
    "zip behind other bytes": lambda: b"plain text first\n" * 99 + zipped(EVIL),
    "npy of objects": lambda: numpy_bytes(np.array([{}, None], dtype=object)),
    "npy with an object field": lambda: numpy_bytes(np.zeros(2, dtype=[("a", "f4"), ("b", "O")])),
    "npz of objects": lambda: numpy_bytes(np.array([{}], dtype=object), np.savez_compressed),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_pickles_in_other_clothes_are_refused(wrapping: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match=r"weights\.bin"):
        check(WRAPPED[wrapping](), tmp_path)


@pytest.mark.parametrize("compress", [0, 3, "gzip", "bz2", "xz", "lzma"])
def test_joblib_files_are_refused_whatever_their_name(compress: object, tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    joblib.dump({"a": np.arange(1000.0)}, tmp_path / "m", compress=compress)
    with pytest.raises(UnsafeFileError):
        refuse_unsafe(tmp_path / "m", "weights.bin")


@pytest.mark.parametrize("name", ["a.pkl", "b/c.PT", "x.pth", "y.ckpt", "z.joblib", "w.pickle"])
def test_names_of_pickles_are_refused_whatever_they_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="named like a pickle"):
        check(b"harmless", tmp_path, name)


@pytest.mark.parametrize("header_bytes", [640, 896, 1152, 1408])
def test_safetensors_are_accepted_even_when_they_begin_like_a_pickle(header_bytes: int, tmp_path: Path) -> None:
    content = struct.pack("<Q", header_bytes) + b'{"__metadata__":{}}'.ljust(header_bytes) + bytes(100)
    assert content[0] == 0x80
    assert content[1] in (2, 3, 4, 5)
    check(content, tmp_path, "model.safetensors")


def test_what_a_real_artifact_holds_is_accepted(tmp_path: Path) -> None:
    import pyarrow as pa
    from safetensors.numpy import save

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("x", pa.int32())])) as writer:
        writer.write_batch(pa.record_batch({"x": pa.array(range(1000), pa.int32())}))
    harmless = {
        "model.safetensors": save({"w": np.random.default_rng(0).normal(size=(64, 64))}),
        "shard.arrow": sink.getvalue().to_pybytes(),
        "tokenizer.json": b'{"model": {"vocab": {"c": 1}}}',
        "vocab.txt": b"cat\ndog\nbird\no\nR\n.",
        "merges.txt": b"c a\nt h\n",
        "README.md": b"(a) Read me.\ncopy this and that.\n",
        "array.npy": numpy_bytes(np.arange(10)),
        "arrays.npz": numpy_bytes(np.arange(10), np.savez),
        "text.gz": gzip.compress(b"hello" * 100),
        "tokens.bin": np.array([640, 3, 17, 99], dtype=np.uint16).tobytes(),
        "empty": b"",
        "one.byte": b"\x80",
    }
    for name, content in harmless.items():
        check(content, tmp_path, name)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x80\x04", b"PK\x03\x04", b"\x93NUMPY", b"\x1f\x8b", b"x\x9c"]))
def test_no_bytes_make_the_check_fail_itself(content: bytes, magic: bytes) -> None:
    unsafe_content(io.BytesIO(magic + content))


def test_a_decompression_bomb_costs_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(200 << 20), 1))
    tracemalloc.start()
    refuse_unsafe(tmp_path / "bomb.gz", "bomb.gz")
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()
