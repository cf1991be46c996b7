"""Check the tiles that a caller passes: which cells have one, their shapes, and dtypes that DALI takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu.errors import InvalidDataError

# Stored type -> type that DALI is given; every value of the first is one of the second.
_TAKEN = {
    "bool": "uint8",
    "uint8": "uint8",
    "int8": "int16",
    "int16": "int16",
    "uint16": "uint16",
    "float16": "float32",
    "float32": "float32",
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of the present cells of a batch.

    Attributes
    ----------
    data
        (m, C, H, W), or m arrays (C, h, w), or m images in a file format (uint8, 1-D); C-contiguous, in
        types that DALI takes.
    places
        int64 (m,), rows of the batch they belong to, ascending.
    n
        Rows of the batch.
    encoded
        Whether they are images in a file format.
    """

    data: np.ndarray | list[np.ndarray]
    places: np.ndarray
    n: int
    encoded: bool = False

    def shapes(self) -> np.ndarray:
        """int64 (m, 3): C, h, w. Not of encoded images."""
        if isinstance(self.data, np.ndarray):
            return np.tile(np.array(self.data.shape[1:], np.int64), (len(self.data), 1))
        return np.array([tile.shape for tile in self.data], np.int64).reshape(-1, 3)

    def by_dtype(self) -> list[tuple[np.dtype, np.ndarray]]:
        """(type, positions among the m tiles); a pipeline takes one type at a time."""
        if isinstance(self.data, np.ndarray):
            return [(self.data.dtype, np.arange(len(self.data)))]
        kinds: dict[np.dtype, list[int]] = {}
        for position, tile in enumerate(self.data):
            kinds.setdefault(tile.dtype, []).append(position)
        return [(dtype, np.array(positions)) for dtype, positions in kinds.items()]

    def take(self, positions: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Data of some of the m tiles."""
        if len(positions) == len(self.data):
            return self.data
        if isinstance(self.data, np.ndarray):
            result: np.ndarray | list[np.ndarray] = self.data[positions]
            return result
        return [self.data[position] for position in positions]


def collect(
    tiles: np.ndarray | Sequence[np.ndarray], cells: np.ndarray, present: np.ndarray | None = None
) -> Tiles:
    """Check the tiles of a batch, and collect those of cells that have one.

    Parameters
    ----------
    tiles
        (n, C, H, W), (n, H, W), or n arrays: (C, h, w), (h, w), or encoded images. Arrays without elements
        are cells without a tile.
    cells
        int64 (n,), row numbers, for messages.
    present
        bool (n,): False for more cells without a tile.

    Raises
    ------
    ValueError
        Lengths that differ, or axes that a tile does not have.
    InvalidDataError
        Values of a type that DALI cannot be given exactly.
    """
    n = len(tiles)
    if len(cells) != n:
        raise ValueError(f"every tile needs its cell row number: {n} tiles, {len(cells)} cells")
    has = np.ones(n, bool) if present is None else np.asarray(present, bool)
    if has.shape != (n,):
        raise ValueError(f"present must have one entry per tile: {n} tiles, present is {has.shape}")
    if isinstance(tiles, np.ndarray) and tiles.dtype != object:
        return _collect_dense(tiles, has)
    arrays = [np.asarray(tile) for tile in tiles]
    has &= np.array([array.size > 0 for array in arrays], bool)
    places = np.flatnonzero(has)
    kept = [arrays[place] for place in places]
    flat = np.array([array.ndim == 1 for array in kept], bool)
    if flat.any():
        _check_encoded(kept, cells[places], flat)
        return Tiles([np.ascontiguousarray(array) for array in kept], places, n, encoded=True)
    return Tiles([_tile(array, cells[place]) for array, place in zip(kept, places, strict=True)], places, n)


def _collect_dense(tiles: np.ndarray, has: np.ndarray) -> Tiles:
    n = len(tiles)
    if tiles.ndim == 3:
        tiles = tiles[:, None]
    if tiles.ndim != 4:
        raise ValueError(
            f"tiles must be (n, C, H, W) or (n, H, W), got {tiles.shape}: {_AXES if tiles.ndim > 4 else ''}"
            "give a list for tiles of differing shape"
        )
    if not tiles[0:1].size:
        has = np.zeros(n, bool)
    places = np.flatnonzero(has)
    kept = tiles if len(places) == n else tiles[places]
    return Tiles(_taken(kept, "tiles"), places, n)


_AXES = "time, depth and other leading axes are not channels; choose one of them, or merge them into C; "


def _check_encoded(arrays: list[np.ndarray], rows: np.ndarray, flat: np.ndarray) -> None:
    if not flat.all():
        raise ValueError(
            f"a batch holds tiles or encoded images, not both: cell row {rows[flat][0]} has one axis, cell "
            f"row {rows[~flat][0]} has shape {arrays[int(np.flatnonzero(~flat)[0])].shape}"
        )
    for array, row in zip(arrays, rows, strict=True):
        if array.dtype != np.uint8:
            raise InvalidDataError(
                f"cell row {row}: an array with one axis is an encoded image and must be uint8 bytes, got "
                f"{array.dtype} {array.shape}; a tile has the axes (C, h, w) or (h, w)"
            )


def _tile(array: np.ndarray, row: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise ValueError(
            f"cell row {row}: a tile must be (C, h, w) or (h, w), got {array.shape}: {_AXES[:-2]}"
        )
    return _taken(array, f"cell row {row}: tiles")


def _taken(array: np.ndarray, what: str) -> np.ndarray:
    name = _TAKEN.get(array.dtype.newbyteorder("=").name)
    if name is None:
        raise InvalidDataError(
            f"{what} are {array.dtype}, which DALI's image operators do not take and float32 does not hold "
            f"exactly; they take {', '.join(_TAKEN)}. Convert before, for instance "
            "tiles.astype('float32') if its 24 bits are enough"
        )
    return np.ascontiguousarray(array, name)


def check_sizes(shapes: np.ndarray, rows: np.ndarray, crop: tuple[int, int] | None, uniform: bool) -> None:
    """Refuse tiles that a crop does not fit into, or whose shapes differ where nothing makes them equal.

    Parameters
    ----------
    shapes
        int64 (m, 3): C, h, w.
    rows
        Their cell rows.
    crop
        (height, width), or None.
    uniform
        Whether heights and widths must be the same: nothing resizes or crops.

    Raises
    ------
    ValueError
        Names the first cell row that does not fit.
    """
    if crop:
        small = np.flatnonzero((shapes[:, 1] < crop[0]) | (shapes[:, 2] < crop[1]))
        if len(small):
            first = small[0]
            raise ValueError(
                f"cell row {rows[first]}: its tile is {shapes[first, 1]} x {shapes[first, 2]} pixels, "
                f"smaller than the crop {crop[0]} x {crop[1]} ({len(small)} of {len(rows)} tiles here are); "
                "crop less"
            )
    compared = shapes if uniform else shapes[:, :1]
    other = np.flatnonzero((compared != compared[0]).any(axis=1))
    if len(other):
        what, advice = ("shapes", "add a crop or resize") if uniform else ("channels", "read them apart")
        raise ValueError(
            f"tiles of one batch leave with one shape, but {what} differ: cell row {rows[0]} has "
            f"{_shape(shapes[0])}, cell row {rows[other[0]]} has {_shape(shapes[other[0]])} (C, h, w); "
            f"{advice}"
        )


def _shape(shape: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, shape))
