"""A store of any format as one AnnData that ingest and conversion read in pieces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import h5py
import numpy as np

from hbx_gpu._h5ad.files import AnnDataGroup, H5adFile, H5muFile
from hbx_gpu._h5ad.matrix import CsrBlock, Matrix, Sliceable
from hbx_gpu._paths import checked
from hbx_gpu._remote.places import local_only
from hbx_gpu._stores.kinds import is_mudata, split_modality
from hbx_gpu._stores.lazy import as_stream
from hbx_gpu._stores.recognize import open_store
from hbx_gpu.errors import InvalidDataError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu._stores.store import Store


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str], *, allow_links: bool = False) -> Iterator[AnnDataGroup]:
    """Open a file or directory that is one AnnData, whatever program wrote it.

    Parts that follow one another, as in an annbatch collection, become one AnnData.

    Parameters
    ----------
    path
        The store, or ``MUDATA:MODALITY`` for one modality of a MuData.
    allow_links
        Follow links that lead out of it.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    InvalidDataError
        Nothing that is known, parts with different features, or a MuData without that modality.
    UnsupportedError
        A MuData store: several matrices, which :func:`open_mudata_source` opens.
    """
    path, modality = split_modality(checked(path))
    if modality:
        with open_mudata_source(path, allow_links=allow_links) as mudata:
            yield mudata.modality(modality)
        return
    if is_mudata(path):
        with open_mudata_source(path, allow_links=allow_links) as mudata:
            names = mudata.modalities()
        raise UnsupportedError(
            f"{path} holds several modalities, {names}, and one matrix is needed here; name one of them as "
            f"{path}:{names[0] if names else 'MODALITY'}, or ingest it, which takes them together"
        )
    if not is_other_store(path):
        with H5adFile(path, allow_links=allow_links) as file:
            yield file
        return
    yield StoreGroup(open_store(path, allow_links=allow_links))


class MuDataSource(Protocol):
    """A MuData as ingest reads it."""

    path: Path

    def modalities(self) -> list[str]:
        """Names of the modalities, in the order of the store."""
        ...

    def modality(self, name: str) -> AnnDataGroup:
        """One of :meth:`modalities`."""
        ...

    def obs(self) -> pd.DataFrame:
        """Table of all cells, without the copies of the modalities' columns."""
        ...


@contextlib.contextmanager
def open_mudata_source(path: str | os.PathLike[str], *, allow_links: bool = False) -> Iterator[MuDataSource]:
    """Open an .h5mu file, or a MuData in zarr; `allow_links` follows links that lead out of it.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    InvalidDataError
        Not a MuData, or one whose modalities do not share their cells.
    """
    path = Path(checked(path))
    if not path.is_dir():
        with H5muFile(path, allow_links=allow_links) as file:
            yield file
        return
    store = open_store(path, allow_links=allow_links)
    if not store.modalities:
        raise InvalidDataError(f"{path} is not a MuData: it is {store.format}")
    yield _MuDataStore(store)


class _MuDataStore:
    """The modalities of a MuData in zarr."""

    def __init__(self, store: Store) -> None:
        self.path, self._store = local_only(store.path), store

    def modalities(self) -> list[str]:
        return list(self._store.modalities)

    def modality(self, name: str) -> AnnDataGroup:
        if name not in self._store.modalities:
            raise InvalidDataError(f"{self.path} has no modality {name!r}; it has {self.modalities()}")
        return StoreGroup(replace(self._store, parts=[self._store.modalities[name][0]]), name)

    def obs(self) -> pd.DataFrame:
        assert self._store.read_obs is not None
        return self._store.read_obs()


def is_other_store(path: Path) -> bool:
    """Whether there is a store that is not an .h5ad file: zarr, 10x Genomics or loom."""
    if path.is_dir():
        return any((path / name).exists() for name in ("zarr.json", ".zgroup"))
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            names = set(file)
            groups = [set(file[name]) for name in names if isinstance(file[name], h5py.Group)]
    except OSError:
        return False  # for the reader of .h5ad files, which says what is wrong
    if {"obs", "var"} & names or {"mod", "obs"} <= names:
        return False
    is_loom = {"row_attrs", "col_attrs"} <= names
    return is_loom or any({"barcodes", "data", "indices", "indptr"} <= group for group in groups)


class StoreGroup(AnnDataGroup):
    """The parts of a store as one AnnData.

    Parameters
    ----------
    store
        The store.
    modality
        Name of the part of a MuData that `store` stands for; empty for a store without modalities.

    Raises
    ------
    InvalidDataError
        Its parts have different features.
    """

    def __init__(self, store: Store, modality: str = "") -> None:
        self.path, self.modality = local_only(store.path), modality
        self.source = f"{store.path}:{modality}" if modality else str(store.path)
        self._parts = store.parts
        first = store.parts[0]
        for part in store.parts[1:]:
            for name in self.matrices():
                if part.var(name).index.tolist() != first.var(name).index.tolist():
                    raise InvalidDataError(
                        f"{part.name} has other features than {first.name}; write each to a store of its own "
                        "and ingest these"
                    )

    def matrices(self) -> list[str]:
        names = [*self._parts[0].matrices, *self._parts[0].unreadable]
        there = [{*part.matrices, *part.unreadable} for part in self._parts]
        return [name for name in names if all(name in part for part in there)]

    def matrix(self, name: str = "X") -> Matrix:
        streams = [as_stream(part.matrix(name)) for part in self._parts]
        return streams[0] if len(streams) == 1 else _Following(streams)

    def obs(self) -> pd.DataFrame:
        import pandas as pd

        frames = [part.obs for part in self._parts]
        if len(frames) == 1:
            return frames[0]
        return pd.concat([_united_categories(frame, frames) for frame in frames])

    def obs_columns(self) -> list[str]:
        return [str(name) for name in self._parts[0].obs.columns]

    def var(self, matrix: str = "X") -> pd.DataFrame:
        return self._parts[0].var(matrix)


def _united_categories(frame: pd.DataFrame, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A frame whose categoricals have the categories of all frames, so that they stay categoricals."""
    import pandas as pd

    changed = frame.copy()
    for name in frame.columns:
        others = [other[name] for other in frames if name in other.columns]
        if len(others) == len(frames) and all(isinstance(o.dtype, pd.CategoricalDtype) for o in others):
            values = list(dict.fromkeys(value for other in others for value in other.cat.categories))
            changed[name] = frame[name].cat.set_categories(values)
    return changed


@dataclass
class _Following:
    """Matrices whose rows follow one another."""

    parts: Sequence[Matrix]

    def __post_init__(self) -> None:
        self.name = self.parts[0].name
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])
        self.dtype: np.dtype = np.result_type(*(part.dtype for part in self.parts))

    @property
    def values(self) -> Sliceable:
        """Stored values of the first matrix, for a look at what kind they are."""
        return self.parts[0].values

    def blocks(self, scratch: Path) -> Iterator[CsrBlock]:
        """All rows in order; see `Matrix.blocks`."""
        before = 0
        for number, part in enumerate(self.parts):
            folder = scratch / f"part{number}"
            folder.mkdir()
            for block in part.blocks(folder):
                values = block.values.astype(self.dtype, copy=False)
                yield replace(block, first_row=block.first_row + before, values=values)
            before += part.shape[0]
