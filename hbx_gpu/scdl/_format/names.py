"""Names of cells and genes, which SCDL's tables leave out: kept in a folder `names/` of the archive."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbx_gpu.errors import CorruptDataError
from hbx_gpu.scdl._format.frames import StoredFrame

FOLDER = "names"
_OBS, _VAR = "obs.parquet", "var.parquet"
_OBS_SCHEMA = pa.schema([("name", pa.string())])
_VAR_SCHEMA = pa.schema([("block", pa.int32()), ("name", pa.string())])
_PIECE = 1 << 20


class NamesWriter:
    """Writes both files as the cells and genes come; nothing is left where no name is known.

    Parameters
    ----------
    folder
        The archive's folder; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir()
        self._obs = pq.ParquetWriter(self._folder / _OBS, _OBS_SCHEMA)
        self._var = pq.ParquetWriter(self._folder / _VAR, _VAR_SCHEMA)
        self._any_obs = self._any_var = False

    def append_obs(self, names: pa.Array | None, n_rows: int) -> None:
        """Names of the next cells; None if unknown."""
        self._any_obs |= names is not None
        for start in range(0, n_rows, _PIECE):
            n = min(_PIECE, n_rows - start)
            piece = pa.nulls(n, pa.string()) if names is None else names.slice(start, n)
            self._obs.write_table(pa.table([piece], schema=_OBS_SCHEMA))

    def append_var(self, block: int, names: Sequence[str] | None) -> None:
        """Names of the genes of a var block; None if unknown."""
        if names is not None:
            self._any_var = True
            columns = [pa.array(np.full(len(names), block, np.int32)), pa.array(list(names), pa.string())]
            self._var.write_table(pa.table(columns, schema=_VAR_SCHEMA))

    def close(self) -> None:
        """Finish the files."""
        self._obs.close()
        self._var.close()
        for known, name in ((self._any_obs, _OBS), (self._any_var, _VAR)):
            if not known:
                (self._folder / name).unlink()
        if not (self._any_obs or self._any_var):
            self._folder.rmdir()


def read_var_names(archive: str | os.PathLike[str], n_blocks: int) -> list[np.ndarray | None]:
    """object, (n_genes,) for each var block: the names of its genes, or None where they are not known."""
    path = Path(archive) / FOLDER / _VAR
    if not path.is_file():
        return [None] * n_blocks
    frame = _opened(path, _VAR_SCHEMA)
    block, names = frame["block"], frame["name"]
    found = [names[block == i] for i in range(n_blocks)]
    return [these if len(these) else None for these in found]


def read_obs_names(archive: str | os.PathLike[str], n_rows: int) -> pa.Array | None:
    """string, (n_rows,). Names of the cells, null where unknown; None if none is, or not of these rows.

    A program that does not know of names may have appended cells: then the file's length is another.
    """
    path = Path(archive) / FOLDER / _OBS
    if not path.is_file():
        return None
    frame = _opened(path, _OBS_SCHEMA)
    if frame.n_rows != n_rows:
        return None
    return pc.cast(frame.arrow("name").combine_chunks(), pa.string())


def _opened(path: Path, schema: pa.Schema) -> StoredFrame:
    frame = StoredFrame(path)
    if missing := [name for name in schema.names if name not in frame.names]:
        raise CorruptDataError(
            f"{path}: column {missing[0]!r} is missing, the file has {', '.join(frame.names[:8]) or 'none'}; "
            "restore it or convert the source again"
        )
    return frame
