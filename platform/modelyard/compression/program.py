"""`torch.export` programs without a pickle: torch's own archive keeps the example inputs as one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor, nn

PROGRAM = "program.pt2"
_PICKLED = "data/sample_inputs/model.pt"


def save_program(model: nn.Module, example: tuple[Tensor, ...], folder: Path) -> None:
    """Trace `model` for any number of rows (and tokens) like `example`, and write graph and weights."""
    import torch

    dims = tuple({axis: torch.export.Dim.AUTO for axis in range(2 if each.ndim == 2 else 1)} for each in example)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=dims, strict=False)
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with zipfile.ZipFile(archive) as full, zipfile.ZipFile(folder / PROGRAM, "w", zipfile.ZIP_STORED) as plain:
        for entry in full.infolist():
            if not entry.filename.endswith(_PICKLED):
                plain.writestr(entry.filename, full.read(entry))


def load_program(folder: Path) -> Any:
    """The program that `save_program` wrote.

    Raises:
        IntegrityError: it is damaged.
        UnsafeFileError: it holds a pickle.
    """
    import torch

    from modelyard.artifacts.unsafe import refuse_unsafe

    refuse_unsafe(folder / PROGRAM, PROGRAM)
    try:
        archive = io.BytesIO((folder / PROGRAM).read_bytes())
        with zipfile.ZipFile(archive, "a") as whole:  # torch asks for the member, and takes an empty one for none
            whole.writestr(f"{whole.namelist()[0].partition('/')[0]}/{_PICKLED}", b"")
        archive.seek(0)
        return torch.export.load(archive)
    except (RuntimeError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{str(folder)!r} holds no program that can be read: {error}") from error
