"""Models of other tasks: pictures come in as files or base64, within bounds, and are arrays behind the gateway."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Reply, Running

from modelyard.serving.gateway import images
from modelyard.serving.gateway.errors import CallError


def picture(mode: str = "RGB", size: tuple[int, int] = (5, 4), kind: str = "PNG", value: int = 7) -> bytes:
    held = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(held, kind)
    return held.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few bytes that unpacks to gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def form(*files: bytes, extra: bytes = b"") -> tuple[bytes, str]:
    parts = [
        b'--edge\r\ncontent-disposition: form-data; name="inputs"; filename="%d.png"\r\n\r\n%b\r\n' % (number, file)
        for number, file in enumerate(files)
    ]
    return b"".join(parts) + extra + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def upload(gateway: Running, key: str, body: bytes, kind: str) -> Reply:
    return gateway.ask("/v1/predict/digits", body, key=key, content_type=kind)


def test_uploaded_pictures_are_answered_in_order(gateway: Running, key: str, backend: RuleBackend) -> None:
    reply = upload(gateway, key, *form(picture(value=9), picture("L", value=3)))
    assert reply.status == 200
    assert [item["output"] for item in reply.json()["data"]] == [
        {"label": 9, "shape": [4, 5, 3], "score": 0.5},
        {"label": 3, "shape": [4, 5], "score": 0.5},
    ]
    assert all(image.dtype == np.uint8 for image in backend.inputs)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_pictures_in_base64_are_the_same(gateway: Running, key: str, backend: RuleBackend, prefix: str) -> None:
    text = prefix + base64.b64encode(picture(value=9)).decode()
    reply = gateway.ask("/v1/predict/digits", {"inputs": [text]}, key=key)
    assert reply.json()["data"] == [
        {"object": "prediction", "index": 0, "output": {"label": 9, "shape": [4, 5, 3], "score": 0.5}}
    ]


@pytest.mark.parametrize(
    ("mode", "kind", "shape"),
    [
        ("1", "PNG", (4, 5)),
        ("L", "JPEG", (4, 5)),
        ("LA", "PNG", (4, 5, 3)),
        ("P", "GIF", (4, 5, 3)),
        ("RGBA", "WEBP", (4, 5, 3)),
        ("RGB", "BMP", (4, 5, 3)),
    ],
)
def test_every_kind_of_picture_becomes_grey_or_rgb(mode: str, kind: str, shape: tuple[int, ...]) -> None:
    assert images.decode([picture(mode, kind=kind)], 100)[0].shape == shape


@pytest.mark.parametrize("width", [5_000, 50_000])
def test_a_decompression_bomb_costs_a_header(gateway: Running, key: str, backend: RuleBackend, width: int) -> None:
    reply = upload(gateway, key, *form(bomb(width, width)))
    assert (reply.status, reply.code) == (413, "body_too_large")
    assert "max_image_pixels" in reply.json()["error"]["message"]
    assert backend.begun == 0


def test_many_pictures_share_one_bound_of_pixels() -> None:
    assert len(images.decode([picture()] * 5, 100)) == 5
    with pytest.raises(CallError, match="together"):
        images.decode([picture()] * 6, 100)


@pytest.mark.parametrize(
    "file",
    [b"", b"no picture", picture()[:40], picture(kind="GIF")[:-8], b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"GIF89a"],
    ids=lambda file: repr(file[:12]),
)
def test_what_is_no_picture_is_a_400_that_names_it(
    gateway: Running, key: str, backend: RuleBackend, file: bytes
) -> None:
    reply = upload(gateway, key, *form(picture(), file))
    assert (reply.status, reply.param) == (400, "inputs.1")
    assert backend.begun == 0


@pytest.mark.parametrize("value", [5, None, "not base64!", ["x"], {"a": 1}, "data:,", True])
def test_an_input_that_is_no_base64_is_a_400(gateway: Running, key: str, value: Any) -> None:
    reply = gateway.ask("/v1/predict/digits", {"inputs": [value]}, key=key)
    assert (reply.status, reply.param) == (400, "inputs.0")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        form(),
        form(extra=b'--edge\r\ncontent-disposition: form-data; name="a"\r\n\r\ntext\r\n'),
        (b"--other--", "multipart/form-data; boundary=edge"),
        (b"--edge--", "multipart/form-data"),
        (b"--edge\r\n\r\n\r\n", "multipart/form-data; boundary=edge"),
        form(*[b"x"] * 257),
    ],
    ids=["no file", "a text", "another boundary", "no boundary", "no name", "too many"],
)
def test_a_form_without_files_alone_is_a_400(gateway: Running, key: str, body: bytes, kind: str) -> None:
    reply = upload(gateway, key, body, kind)
    assert (reply.status, (reply.param or "").split(".")[0]) == (400, "inputs"), reply.body


def test_inputs_of_other_tasks_pass_as_they_are(gateway: Running, key: str, backend: RuleBackend) -> None:
    reply = gateway.ask("/v1/predict/minilm", {"inputs": [[1, 2, 3], [4, 4]]}, key=key)
    assert reply.status == 200
    assert backend.inputs == [[1, 2, 3], [4, 4]]
