"""Images as a modality: a table says which tile, box or file belongs to which cell; checked beforehand."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._untrusted import check_file
from hbx_gpu.atlas._ingest.grids import write_grid
from hbx_gpu.atlas._ingest.image_files import (
    StoredImage,
    check_files,
    hash_files,
    open_image,
    open_tiles,
    row_blocks,
)
from hbx_gpu.atlas._ingest.joining import Role
from hbx_gpu.atlas._ingest.parts import Part, Storage, Tick, dense_pointers, struct
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.atlas._writing.arrays import DenseGroupWriter, finish_group
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_LAYER = "raw"
_BLOCK_BYTES = 1 << 23
_SHOWN = 5


@dataclass(frozen=True)
class ImageInput:
    """Images and the table that maps cells to them; an argument of :func:`hbx_gpu.atlas.add_multimodal`.

    Attributes
    ----------
    image
        For tiles an (N, C, Y, X) array, for boxes one large image: path of a zarr array, an OME-Zarr image, a
        TIFF or .npy file, or an array. For files of one picture each the folder that their names are
        relative to (None: the table has whole paths), or the files themselves, in the order of the tile
        numbers.
    table
        A .csv, .tsv or .parquet file or a data frame, one row per cell. Columns that say nothing about images
        become obs columns; in text files, numbers and ``True`` or ``False`` are recognized, and empty cells
        have no value.
    cell_column
        Column with the cell ids.
    tile_column
        Column with tile numbers, from 0.
    file_column
        Column with file names.
    axes
        One letter per axis of the image, ``"cyx"``; by default what the file says, else the last of
        ``tczyx``. Boxes are given by columns ``y0``, ``y1``, ``x0``, ``x1`` and so on, half-open, in pixels.
    """

    image: object
    table: object
    cell_column: str = "cell_id"
    tile_column: str = "tile"
    file_column: str = "file"
    axes: str | None = None


@dataclass(frozen=True)
class _Table:
    """The table of an :class:`ImageInput`."""

    source: str
    frame: pd.DataFrame
    ids: Sequence[str]
    own_columns: Sequence[str]
    is_text: bool

    @classmethod
    def read(cls, given: ImageInput) -> _Table:
        source, frame, is_text = _read_table(given.table)
        if given.cell_column not in frame.columns:
            raise InvalidDataError(
                f"{source} has no column {given.cell_column!r} with the cell ids; its columns: "
                f"{[str(name) for name in frame.columns]}"
            )
        if not len(frame):
            raise InvalidDataError(f"{source} has no rows: nothing to ingest")
        ids = ["" if value is None or value != value else str(value) for value in frame[given.cell_column]]
        return cls(source, frame, ids, (given.cell_column, given.tile_column, given.file_column), is_text)

    def column(self, name: str) -> list[str]:
        """Strings, none missing."""
        values = self.frame[name].tolist()
        for row, value in enumerate(values):
            if value is None or value != value or not str(value):
                raise InvalidDataError(f"{self.source}: column {name!r} is empty for {self.who(row)}")
        return [str(value) for value in values]

    def integers(self, name: str) -> np.ndarray:
        """int64, (n,)."""
        import pandas as pd

        values = pd.to_numeric(self.frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.isfinite(values) & (np.trunc(values) == values)))
        if bad.size:
            row = int(bad[0])
            raise InvalidDataError(
                f"{self.source}: column {name!r} holds {str(self.frame[name].iloc[row])!r} for "
                f"{self.who(row)}, expected a whole number"
            )
        result: np.ndarray = values.astype(np.int64)
        return result

    def labels(self, used: Sequence[str]) -> pd.DataFrame | None:
        """Columns that do not say where images are, as obs columns; None without any."""
        apart = {*self.own_columns, *used}
        names = [name for name in self.frame.columns if name not in apart and not _NO_LABEL(str(name))]
        if not names:
            return None
        labels = self.frame[names].copy()
        if self.is_text:
            labels = labels.apply(_parsed)
        labels.index = list(self.ids)
        return labels

    def who(self, row: int) -> str:
        """A row, for messages."""
        return f"cell {self.ids[row]!r} (row {row})"

    def digest(self, columns: Sequence[str]) -> str:
        """SHA-256 of the ids and some columns."""
        digest = hashlib.sha256()
        for values in (self.ids, *(self.frame[name].astype(str) for name in columns)):
            digest.update("\0".join(values).encode())
            digest.update(b"\0\0")
        return digest.hexdigest()


# Corners of boxes, and the index of a data frame that was written without a name for it.
_NO_LABEL = re.compile(r"[tczyxs][01]|Unnamed: \d+").fullmatch
# What pandas writes for a number; 007 and numbers that a float64 would round are texts.
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d*)?([eE][+-]?\d+)?")


def _parsed(texts: pd.Series) -> pd.Series:
    """A column of a text file as numbers or booleans, if all of its texts are such."""
    import pandas as pd

    given = texts[texts != ""]
    if not len(given):
        return texts.where(texts != "", None)
    for kind, matches in (
        ("Int64", _WHOLE.fullmatch),
        ("Float64", _NUMBER.fullmatch),
        ("boolean", lambda text: text in ("True", "False")),
    ):
        if all(map(matches, given)):
            values = given.map({"True": True, "False": False}) if kind == "boolean" else pd.to_numeric(given)
            column = values.astype(kind).reindex(texts.index)
            return column if column.isna().any() else column.astype(kind.lower().replace("boolean", "bool"))
    return texts.where(texts != "", None)


def _read_table(table: object) -> tuple[str, pd.DataFrame, bool]:
    """Name for messages, the table, and whether it comes from text, where nothing has a type."""
    import pandas as pd

    if isinstance(table, pd.DataFrame):
        return "table of images", table, False
    if isinstance(table, Mapping):
        return "table of images", pd.DataFrame(table), False
    if not isinstance(table, str | os.PathLike):
        raise TypeError(
            f"a table of cells and images is a file or a data frame, not a {type(table).__name__}"
        )
    path = Path(table)
    check_file(path, "a table of cells and images")
    try:
        if path.suffix == ".parquet":
            return str(path), pd.read_parquet(path), False
        # Strings: a cell may be called NA, or 007.
        separator = "\t" if {".tsv", ".txt"} & set(path.suffixes) else ","
        return str(path), pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False), True
    except (ValueError, OSError) as error:
        raise InvalidDataError(f"{path}: cannot read the table: {error}") from error


def image_part(
    name: str, field_name: str, space: FeatureSpace, given: ImageInput, *, allow_links: bool = False
) -> Part:
    """The modality that an :class:`ImageInput` makes in a feature space of images.

    Raises
    ------
    InvalidDataError
        The table lacks a column or an id, or says what the image does not have; tiles differ in shape; the
        image has a dtype that the space does not store.
    FileNotFoundError
        No such image, table or file.
    """
    table = _Table.read(given)
    if space.pointer == "sparse":
        return _EncodedPart(name, field_name, space, table, given)
    if space.pointer == "discrete_spatial":
        return _BoxPart(name, field_name, space, table, given, allow_links)
    return _TilePart(name, field_name, space, table, given, allow_links)


class _ImagePart(Part):
    """What all images have in common: no features, and obs columns from their table."""

    def __init__(self, name: str, field_name: str, space: FeatureSpace, table: _Table) -> None:
        self.name, self.field_name, self.space = name, field_name, space
        self.role: Role = "table"
        self.table, self.ids = table, table.ids
        self.features = None

    def _identify(self, source_name: str, content: str, columns: Sequence[str]) -> None:
        """Set what is known of the part once the columns that say where its images are have been read."""
        self.source, self.source_name = self.table.source, source_name
        self.obs = self.table.labels(columns)
        labels = [] if self.obs is None else list(self.obs.columns)
        digest = hashlib.sha256(f"{content} {self.table.digest([*columns, *labels])}".encode()).hexdigest()
        self.identity = {
            "source_sha256": digest,
            "source_matrix": ",".join(columns),
            "zarr_layer": _LAYER,
            "feature_id_column": "",
        }

    def _check_dtype(self, image: StoredImage) -> None:
        known = self.space.required_layers[_LAYER]
        if image.dtype.name not in known:
            raise InvalidDataError(
                f"{image.source} holds {image.dtype}; feature space {self.space.name!r} stores "
                f"{list(known)}: convert it, so that nothing is lost unseen"
            )


class _TilePart(_ImagePart):
    """Tiles of one shape, numbered as in their array."""

    def __init__(
        self,
        name: str,
        field_name: str,
        space: FeatureSpace,
        table: _Table,
        given: ImageInput,
        allow_links: bool,
    ) -> None:
        super().__init__(name, field_name, space, table)
        numbers = given.tile_column if given.tile_column in table.frame.columns else None
        if numbers is None and given.file_column not in table.frame.columns:
            raise InvalidDataError(
                f"{table.source} has neither a column {given.tile_column!r} with tile numbers nor a column "
                f"{given.file_column!r} with file names; its columns: {list(table.frame.columns)}"
            )
        if numbers is not None:
            self._image = open_image(given.image, axes=given.axes, allow_links=allow_links)
            self._position = table.integers(numbers)
        else:
            files = _paths(table.column(given.file_column), given.image)
            unique = list(dict.fromkeys(files))
            place = {file: i for i, file in enumerate(unique)}
            self._image = open_tiles(unique)
            self._position = np.array([place[file] for file in files], np.int64)
        shape = self._image.shape
        if len(shape) not in (3, 4):
            raise InvalidDataError(
                f"{self._image.source} has shape {shape}; tiles are an (N, C, Y, X) or (N, Y, X) array"
            )
        # One channel where there is no axis for it.
        self._tile_shape = shape[1:] if len(shape) == 4 else (1, *shape[1:])
        self._check_dtype(self._image)
        outside = np.flatnonzero((self._position < 0) | (self._position >= shape[0]))
        if outside.size:
            row = int(outside[0])
            raise InvalidDataError(
                f"{table.source}: {table.who(row)} names tile {self._position[row]}, but "
                f"{self._image.source} "
                f"has {shape[0]} tiles, 0 to {shape[0] - 1}"
            )
        column = numbers or given.file_column
        self._identify(self._image.source_name, self._image.digest(), [column])

    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """See :class:`hbx_gpu.atlas._ingest.parts.Part`; all tiles are stored, under their own numbers."""
        del scratch, keep
        image = self._image
        writer = DenseGroupWriter(
            group, self.space, layers={_LAYER: image.dtype.name}, row_shape=self._tile_shape, **vars(storage)
        )
        try:
            for rows in row_blocks(image.shape, image.dtype.itemsize, _BLOCK_BYTES):
                tiles = image.read((rows,))
                writer.append({_LAYER: tiles.reshape(len(tiles), *self._tile_shape)})
                tick(len(self.ids) * rows.stop // image.shape[0])
            writer.close()
        finally:
            writer.abort()
        return dense_pointers(self._position)


class _BoxPart(_ImagePart):
    """Boxes of one large image."""

    def __init__(
        self,
        name: str,
        field_name: str,
        space: FeatureSpace,
        table: _Table,
        given: ImageInput,
        allow_links: bool,
    ) -> None:
        super().__init__(name, field_name, space, table)
        self._image = open_image(given.image, axes=given.axes, allow_links=allow_links)
        shape, axes = self._image.shape, self._image.axes
        if not 2 <= len(shape) <= 5:
            raise InvalidDataError(f"{self._image.source} has shape {shape}; images have 2 to 5 axes")
        self._check_dtype(self._image)
        bounded = [i for i, axis in enumerate(axes) if {f"{axis}0", f"{axis}1"} & set(table.frame.columns)]
        columns = [f"{axes[i]}{end}" for i in bounded for end in "01"]
        strange = [f"{a}{end}" for a in "tczyxs" if a not in axes for end in "01"]
        strange = [column for column in strange if column in table.frame.columns]
        if strange:
            raise InvalidDataError(
                f"{table.source}: columns {strange} bound axes that {self._image.source} does not have; its "
                f"axes are {axes!r}, say otherwise with axes="
            )
        missing = [column for column in columns if column not in table.frame.columns]
        if missing or not bounded:
            expected = [f"{axis}{end}" for axis in axes for end in "01"]
            raise InvalidDataError(
                f"{table.source}: boxes are given by columns {expected} or some pairs of them "
                f"({self._image.source} has axes {axes!r}); missing: {missing or expected}, its columns: "
                f"{list(table.frame.columns)}"
            )
        # Boxes are on the leading axes, up to the last one that is bounded; those between are taken in full.
        rank = bounded[-1] + 1
        n = len(table.ids)
        self._low = np.zeros((n, rank), np.int64)
        self._high = np.tile(np.array(shape[:rank], np.int64), (n, 1))
        for i in bounded:
            self._low[:, i], self._high[:, i] = (table.integers(f"{axes[i]}{end}") for end in "01")
        self._check_boxes()
        self._identify(self._image.source_name, self._image.digest(), columns)

    def _check_boxes(self) -> None:
        shape, axes = self._image.shape, self._image.axes
        for i in range(self._low.shape[1]):
            low, high = self._low[:, i], self._high[:, i]
            bad = np.flatnonzero((low < 0) | (high > shape[i]) | (low >= high))
            if bad.size:
                row = int(bad[0])
                raise InvalidDataError(
                    f"{self.table.source}: the box of {self.table.who(row)} runs from {low[row]} to "
                    f"{high[row]} along axis {axes[i]!r}; boxes are half-open, not empty and inside the "
                    f"image {self._image.source}, which has 0 to {shape[i]} there ({bad.size} box(es) are "
                    "not)"
                )

    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """See :class:`hbx_gpu.atlas._ingest.parts.Part`; the whole image is stored."""
        del scratch, keep
        path = group / self.space.layers_path / _LAYER
        write_grid(path, self._image, codec=storage.codec, done=lambda part: tick(int(part * len(self.ids))))
        finish_group(group, self.space)
        kind = pa.list_(pa.int64())
        return struct(min_corner=pa.array(list(self._low), kind), max_corner=pa.array(list(self._high), kind))


class _EncodedPart(_ImagePart):
    """Picture files, stored byte by byte as they are; cells may share one."""

    def __init__(
        self, name: str, field_name: str, space: FeatureSpace, table: _Table, given: ImageInput
    ) -> None:
        super().__init__(name, field_name, space, table)
        if given.file_column not in table.frame.columns:
            raise InvalidDataError(
                f"{table.source} has no column {given.file_column!r} with file names; its columns: "
                f"{list(table.frame.columns)}"
            )
        files = _paths(table.column(given.file_column), given.image)
        self._files = list(dict.fromkeys(files))
        check_files(self._files)
        place = {file: i for i, file in enumerate(self._files)}
        self._file_of = np.array([place[file] for file in files], np.int64)
        empty = [str(file) for file in self._files if not file.stat().st_size]
        if empty:
            raise InvalidDataError(f"{len(empty)} image file(s) are empty, first: {empty[:_SHOWN]}")
        self._identify(self._files[0].parent.name, hash_files(self._files), [given.file_column])

    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """See :class:`hbx_gpu.atlas._ingest.parts.Part`; files that no cell points to are left out."""
        del scratch
        ends = np.zeros(len(self._files), np.int64)
        used = set(self._file_of[keep].tolist())
        writer = DenseGroupWriter(group, self.space, layers={_LAYER: "uint8"}, row_shape=(), **vars(storage))
        try:
            for i, file in enumerate(self._files):
                if i in used:
                    writer.append({_LAYER: np.fromfile(file, np.uint8)})
                ends[i] = writer.length
                tick((i + 1) * len(self.ids) // len(self._files))
            writer.close()
        finally:
            writer.abort()
        starts = np.concatenate([[0], ends[:-1]])
        chosen = self._file_of
        return struct(
            start=pa.array(starts[chosen]), end=pa.array(ends[chosen]), zarr_row=pa.array(chosen, pa.int64())
        )


def _paths(names: Sequence[str], folder: object) -> list[Path]:
    if folder is None:
        return [Path(name) for name in names]
    if not isinstance(folder, str | os.PathLike):
        raise InvalidDataError(
            "the table names files: the image must be the folder they are in, or None for whole paths, not "
            f"{type(folder).__name__}"
        )
    return [Path(folder) / name for name in names]
