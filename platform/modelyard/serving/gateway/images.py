"""Pictures from callers: decoded within bounds, from formats that are plain pixels."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

from modelyard.serving.gateway.errors import CallError, invalid

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def from_base64(value: Any, param: str) -> bytes:
    """The file in a JSON input: base64, or a data URL of it.

    Raises:
        CallError: 400, it is neither.
    """
    if isinstance(value, str):
        text = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise invalid(param, f"`{param}` is no image file in base64")


def decode(files: Sequence[bytes], max_pixels: int) -> list[Any]:
    """Arrays (H, W) for grey and (H, W, 3) for other pictures, uint8; of an animation the first frame. Takes CPU time.

    All headers are read before any picture is unpacked, so a decompression bomb costs a header.

    Raises:
        CallError: 400 a file is no picture in one of `FORMATS`, 413 they have more than `max_pixels` together.
    """
    import numpy as np
    from PIL import Image

    opened, pixels = [], 0
    text = f"the pictures have more than {max_pixels} pixels together (the gateway's `max_image_pixels`)"
    too_large = CallError(413, "body_too_large", f"{text}; make them smaller, or send fewer", param="inputs")
    for number, file in enumerate(files):
        try:
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        except Image.DecompressionBombError:
            raise too_large from None
        except (OSError, ValueError, SyntaxError):
            known = ", ".join(FORMATS)
            raise invalid(f"inputs.{number}", f"input {number} is no picture that can be read ({known})") from None
        pixels += image.width * image.height
        if pixels > max_pixels:
            raise too_large
        opened.append(image)
    arrays = []
    for number, image in enumerate(opened):
        try:
            grey = image.mode in ("1", "L", "I;16")
            arrays.append(np.asarray(image.convert("L" if grey else "RGB")))
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):
            raise invalid(f"inputs.{number}", f"input {number} is a broken picture") from None
    return arrays
