"""Opening stored images: zarr and OME-Zarr, TIFF, .npy, arrays in memory, files of one tile each.

Nothing here knows of cells; :class:`StoredImage` reads regions and never the whole.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from hbx_gpu._untrusted import check_regular, check_tree, found_at
from hbx_gpu.atlas._ingest.inputs import hash_file
from hbx_gpu.errors import HbxError, InvalidDataError

if TYPE_CHECKING:
    import zarr
    from PIL.Image import Image

# Of arrays whose axes nobody names: the last of these.
_AXES = "tczyx"
_HASH_BYTES = 1 << 24
_TIFF = (".tif", ".tiff")
_SHOWN = 3
# What zarr-python raises for metadata that are damaged, and what lies elsewhere than OME-Zarr has it.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)


@runtime_checkable
class Sliced(Protocol):
    """Anything that is sliced as NumPy arrays are."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, region: tuple[slice, ...], /) -> object: ...


@dataclass(frozen=True)
class StoredImage:
    """An array on disk or in memory.

    Attributes
    ----------
    source, source_name
        For messages, and as recorded with the dataset.
    shape, dtype
        Shape and dtype of the array, in native byte order.
    axes
        One lower-case letter per axis.
    array
        Anything that is sliced as NumPy arrays are.
    digest
        Gives the SHA-256 of its content, in hexadecimal.
    """

    source: str
    source_name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str
    array: Sliced
    digest: Callable[[], str]

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """A region, in full along axes that are not named.

        Raises
        ------
        InvalidDataError
            The file cannot be read there.
        """
        try:
            return np.asarray(self.array[region]).astype(self.dtype, copy=False)
        except (OSError, ValueError, RuntimeError) as error:  # what decoders of damaged files raise
            raise InvalidDataError(
                f"{self.source}: cannot read {region}: {error}; it may be damaged"
            ) from error


def open_image(image: object, *, axes: str | None = None, allow_links: bool = False) -> StoredImage:
    """Open an image for reading.

    Parameters
    ----------
    image
        Path of a zarr array (v2 or v3), an OME-Zarr image (its finest level), a TIFF file (its first series)
        or an .npy file; an array; or a sequence of files of one tile each.
    axes
        One letter per axis, such as ``"cyx"``, where the file does not say or says otherwise.
    allow_links
        Follow links that lead out of a zarr folder.

    Raises
    ------
    FileNotFoundError
        There is nothing.
    InvalidDataError
        It is not an image, or not an image of this kind.
    UnsafePathError
        It is neither a regular file nor a folder of such files, or links lead out of the folder.
    """
    if isinstance(image, str | os.PathLike):
        opened = _open_path(Path(image), allow_links=allow_links)
    elif isinstance(image, Sequence):
        opened = open_tiles([Path(file) for file in image])
    elif isinstance(image, Sliced):
        array = image
        opened = _opened(array, "array in memory", "array in memory", lambda: _hash_array(array))
    else:
        raise InvalidDataError(
            f"expected an image: a path, an array or a list of files, got {type(image).__name__}"
        )
    if axes is not None:
        if len(axes) != len(opened.shape) or len(set(axes.lower())) != len(axes):
            raise InvalidDataError(
                f"{opened.source} has {len(opened.shape)} axes, shape {opened.shape}: axes={axes!r} must "
                "be as many different letters"
            )
        opened = StoredImage(**vars(opened) | {"axes": axes.lower()})
    return opened


def _opened(
    array: Sliced, source: str, name: str, digest: Callable[[], str], axes: str | None = None
) -> StoredImage:
    shape = tuple(int(n) for n in array.shape)
    if not 1 <= len(shape) or not all(shape):
        raise InvalidDataError(f"{source} has shape {shape}: nothing to ingest")
    named = (axes or "").lower()
    if len(named) != len(shape) or len(set(named)) != len(named):
        named = _AXES[-len(shape) :] if len(shape) <= len(_AXES) else "n" + "?" * (len(shape) - 1)
    return StoredImage(source, name, shape, np.dtype(array.dtype).newbyteorder("="), named, array, digest)


def _open_path(path: Path, *, allow_links: bool) -> StoredImage:
    if not path.exists():
        raise FileNotFoundError(f"expected an image at {path}; it is missing")
    if path.is_dir():
        return _open_zarr(path, allow_links=allow_links)
    check_regular(path, path.stat())
    if path.suffix.lower() in _TIFF:
        return _open_tiff(path)
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise InvalidDataError(f"{path} cannot be read as an array: {error}") from error
        return _opened(array, str(path), path.name, lambda: hash_file(path))
    raise InvalidDataError(
        f"{path}: expected a zarr array or OME-Zarr folder, or a .tif, .tiff or .npy file; encoded "
        "pictures of one cell each go to feature space encoded_images"
    )


def _open_zarr(path: Path, *, allow_links: bool) -> StoredImage:
    import zarr

    # zarr-python would wait for a FIFO, and follow any link.
    check_tree(path, links=allow_links)
    try:
        node = zarr.open(path, mode="r")
        axes = None
        if isinstance(node, zarr.Group):
            images = _multiscales(node, path)
            level = images[0]["datasets"][0]["path"]
            axes = "".join(
                str(a["name"] if isinstance(a, dict) else a)[:1] for a in images[0].get("axes", ())
            )
            # The finest level comes first.
            node = node[level]
            path = (
                path / node.path
            )  # `level` may be an absolute path, which zarr takes as one below the group
        if not isinstance(node, zarr.Array):
            raise InvalidDataError(f"{path} is not a zarr array")
        return _opened(node, str(path), path.name, lambda: hash_file(path), axes)
    except HbxError:
        raise
    except _DAMAGED as error:
        raise InvalidDataError(
            f"{path} is a folder, but not a zarr array or OME-Zarr image that can be read: {error}"
        ) from error


def _multiscales(group: zarr.Group, path: Path) -> Any:
    attributes: dict[str, Any] = dict(group.attrs)
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise InvalidDataError(
            f"{path} is a zarr group without OME-Zarr's multiscales; name the array in it: "
            f"{sorted(group.keys())}"
        )
    return images


def _open_tiff(path: Path) -> StoredImage:
    tifffile = _import("tifffile", f"{path} is a TIFF file")
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes = series.axes
            # A store of its own handle: regions are read and decoded as they are asked for.
            store = tifffile.imread(path, aszarr=True, series=0, level=0)
    except (tifffile.TiffFileError, IndexError) as error:
        raise InvalidDataError(f"{path} cannot be read as a TIFF file: {error}") from error
    import zarr

    node = zarr.open(store, mode="r")
    if not isinstance(node, zarr.Array):
        store.close()
        raise InvalidDataError(f"{path} is a TIFF file whose first series is not one array")
    # The store opens the file again when it reads, and nothing else closes that.
    weakref.finalize(node, store.close)
    return _opened(node, str(path), path.name, lambda: hash_file(path), axes)


def open_tiles(files: Sequence[Path]) -> StoredImage:
    """Files of one tile each, all of one shape, as one (N, C, Y, X) image.

    TIFF files hold (Y, X) or (C, Y, X) or, as PNG and JPEG do, (Y, X, C).

    Raises
    ------
    FileNotFoundError
        A file is missing.
    InvalidDataError
        Tiles differ in shape or dtype; names the first that differs from the first one.
    """
    if not files:
        raise InvalidDataError("expected files of one tile each, got none")
    check_files(files)
    shape, dtype = _tile_form(files[0])
    for file in files[1:]:
        if (found := _tile_form(file)) != (shape, dtype):
            raise InvalidDataError(
                f"tiles of one group have one shape and dtype: {files[0]} is {shape} {dtype}, {file} is "
                f"{found[0]} {found[1]}; resize them, add them as datasets of their own, or add the files "
                "as they are (feature space encoded_images)"
            )
    array = _TileFiles(tuple(files), shape, dtype)

    def digest() -> str:
        return hash_files(files)

    return _opened(array, f"{files[0]} and {len(files) - 1} more", files[0].name, digest, "ncyx")


@dataclass(frozen=True)
class _TileFiles:
    """Sliced along the first axis only."""

    files: tuple[Path, ...]
    tile_shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.files), *self.tile_shape)

    def __getitem__(self, region: tuple[slice, ...], /) -> np.ndarray:
        return np.stack([_read_tile(file) for file in self.files[region[0] if region else slice(None)]])


def _tile_form(file: Path) -> tuple[tuple[int, ...], np.dtype]:
    if file.suffix.lower() in _TIFF:
        opened = _open_tiff(file)
        return _channels_first(opened.shape, opened.axes, file)[0], opened.dtype
    with _open_picture(file) as picture:
        bands = len(picture.getbands())
        dtype = np.dtype(
            {"1": "bool", "I": "int32", "F": "float32", "I;16": "uint16"}.get(picture.mode, "uint8")
        )
        return (bands, picture.height, picture.width), dtype


def _read_tile(file: Path) -> np.ndarray:
    if file.suffix.lower() in _TIFF:
        opened = _open_tiff(file)
        values = opened.read(())
        shape, moved = _channels_first(opened.shape, opened.axes, file)
        return (np.moveaxis(values, -1, 0) if moved else values).reshape(shape)
    with _open_picture(file) as picture:
        values = np.asarray(picture)
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def _channels_first(shape: tuple[int, ...], axes: str, file: Path) -> tuple[tuple[int, ...], bool]:
    if len(shape) == 2:
        return (1, *shape), False
    if len(shape) == 3:
        last = axes.endswith("s")
        return ((shape[2], *shape[:2]) if last else shape), last
    raise InvalidDataError(f"{file}: one tile is (Y, X) or (C, Y, X), found shape {shape}")


def _open_picture(file: Path) -> Image:
    images = _import("PIL.Image", f"{file} is a picture")
    try:
        image: Image = images.open(file)
        return image
    except OSError as error:
        raise InvalidDataError(f"{file} cannot be read as a picture: {error}") from error


def _import(name: str, why: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidDataError(
            f"{why}, which needs {name.split('.')[0]}: pip install 'hbx_gpu[multimodal]'"
        ) from error


def check_files(files: Sequence[Path]) -> None:
    """Refuse a list with files that do not exist.

    Raises
    ------
    FileNotFoundError
        Names the first of them.
    """
    missing = [f"{file} ({found})" for file in files if (found := found_at(file))]
    if missing:
        raise FileNotFoundError(f"{len(missing)} image file(s) cannot be read, first: {missing[:_SHOWN]}")


# Content


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the content of files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hash_file(file).encode())
    return digest.hexdigest()


def _hash_array(array: Sliced) -> str:
    digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    for part in row_blocks(tuple(array.shape), np.dtype(array.dtype).itemsize, _HASH_BYTES):
        digest.update(np.ascontiguousarray(array[(part,)]).tobytes())
    return digest.hexdigest()


def row_blocks(shape: tuple[int, ...], itemsize: int, nbytes: int) -> Iterator[slice]:
    """Stretches of the first axis of about `nbytes` each, at least one element long."""
    width = max(1, int(np.prod(shape[1:], dtype=np.int64)) * itemsize)
    step = max(1, nbytes // width)
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))
