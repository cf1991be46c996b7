"""The matrix of a file, as a command line names it."""

from __future__ import annotations

from pathlib import Path

from hbx_gpu._stores.kinds import is_mudata

AUTO = "auto"
"""What a user writes for the matrix that is taken where nobody names one."""


def matrix_named(text: str | None) -> str | None:
    """The matrix that a command line means: ``layers/counts`` is the layer ``counts``, ``auto`` is None."""
    return None if text in (None, AUTO) else text.removeprefix("layers/")


def file_and_matrix(path: Path) -> tuple[Path, str | None]:
    """The parts of ``FILE:MATRIX``; None where the path names no matrix, or a file is called so."""
    # MUDATA:NAME is a modality. A layer may be written as a path: FILE:layers/counts.
    name, colon, matrix = str(path).rpartition(":")
    file = Path(name)
    if not (name and colon and matrix) or path.exists() or is_mudata(file):
        return path, None
    return (file, matrix) if file.exists() or file.suffix == ".h5ad" else (path, None)
