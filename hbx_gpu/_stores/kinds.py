"""What a path holds, told without opening it and without importing a library."""

from __future__ import annotations

from pathlib import Path


def is_mudata(path: Path) -> bool:
    """Whether a path is a MuData: a file called .h5mu, or a zarr group with modalities."""
    if path.is_dir():
        marks = ("zarr.json", ".zgroup")
        return all(any((path / key / mark).exists() for mark in marks) for key in ("", "mod", "obs"))
    return path.suffix == ".h5mu"
