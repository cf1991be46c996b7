"""What lies at a path, on a local disk or in object storage."""

from __future__ import annotations

from hbx_gpu._remote import stores
from hbx_gpu._remote.places import AnyPath, Place


def is_file(path: AnyPath) -> bool:
    """Whether a file, or an object, is there."""
    return stores.head(path) is not None if isinstance(path, Place) else path.is_file()


def is_dir(path: AnyPath) -> bool:
    """Whether a directory is there, or objects lie below the address; servers that cannot list say no."""
    if not isinstance(path, Place):
        return path.is_dir()
    return path.lists and stores.any_below(path)


def size_below(path: AnyPath) -> int:
    """Bytes of all files, or objects, below a path."""
    if isinstance(path, Place):
        return sum(info.nbytes for _, info in stores.walk(path))
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def folders(path: AnyPath) -> list[AnyPath]:
    """The directories directly below a path, sorted; none where the path does not exist."""
    if not isinstance(path, Place):
        return [p for p in sorted(path.iterdir()) if p.is_dir()] if path.is_dir() else []
    return [path / name for name in stores.names(path)[1]]
