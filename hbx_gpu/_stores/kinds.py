"""What a path holds, told without opening it and without importing a library."""

from __future__ import annotations

import os
from pathlib import Path


def is_mudata(path: Path) -> bool:
    """Whether a path is a MuData: a file called .h5mu, or a zarr group with modalities."""
    if path.is_dir():
        marks = ("zarr.json", ".zgroup")
        return all(any((path / key / mark).exists() for mark in marks) for key in ("", "mod", "obs"))
    return path.suffix == ".h5mu"


def split_modality(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """The parts of ``MUDATA:MODALITY``; an empty name where the path is not such a pair."""
    name, _, modality = os.fspath(path).rpartition(":")
    if name and modality and is_mudata(Path(name)) and not Path(path).exists():
        return Path(name), modality
    return Path(path), ""
