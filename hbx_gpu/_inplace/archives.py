"""SCDL archives as stores: each block of genes of an archive is a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._inplace.copies import copy_of
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.plain import plain_layout
from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu._stores.store import Part, Store
from hbx_gpu.scdl._format.archive import Archive, open_archive
from hbx_gpu.scdl._format.layout import COL_PTR, DATA, ROW_PTR
from hbx_gpu.scdl._format.names import read_obs_names
from hbx_gpu.scdl._sources.axis import gene_axis
from hbx_gpu.scdl._sources.cells import gene_blocks

if TYPE_CHECKING:
    import pandas as pd


def open_scdl(path: AnyPath, *, allow_links: bool = False) -> Store:
    """An SCDL archive; `allow_links` follows links that lead out of it.

    Of an archive in object storage, everything but the values and their columns is copied first.

    Raises
    ------
    CorruptDataError
        Files that contradict each other.
    """
    archive = open_archive(copy_of(path) if isinstance(path, Place) else path, allow_links=allow_links)
    archive.check_pointers()
    bounds = archive.bounds if len(archive.bounds) > 1 else np.array([0, archive.n_rows])
    parts = [_part(path, archive, block, bounds) for block in range(len(bounds) - 1)]
    return Store(path, "SCDL archive", parts, allow_links=allow_links)


def _part(path: AnyPath, archive: Archive, block: int, bounds: np.ndarray) -> Part:
    first, last = (int(row) for row in bounds[block : block + 2])
    begin, end = int(archive.indptr[first]), int(archive.indptr[last])
    name, where = f"{path}, block {block}", path.name

    def layout(file: str, array: np.ndarray, at: int, n: int) -> ArrayLayout:
        size = array.dtype.itemsize
        return plain_layout(path / file, array.dtype, n, name=f"{where}/{file}", byte_offset=at * size)

    values = layout(DATA, archive.data, begin, end - begin)
    index = layout(COL_PTR, archive.indices, begin, end - begin)
    indptr = layout(ROW_PTR, archive.indptr, first, last - first + 1)
    names = gene_axis([gene_blocks(archive)[block]], None).uids if len(archive.bounds) > 1 else None
    width = len(names) if names is not None else archive.width(block)
    matrix = StoredMatrix(name, (last - first, width), "csr", values, index, indptr, begin)

    def var(_: str) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(index=pd.Index(names if names is not None else np.arange(width).astype(str)))

    return Part(name, {"X": matrix}, lambda: _obs(archive, first, last), var)


def _obs(archive: Archive, first: int, last: int) -> pd.DataFrame:
    import pandas as pd

    names = read_obs_names(archive.path, archive.n_rows)
    if names is not None:
        index = pd.Index(names.slice(first, last - first).to_pandas().astype(str))
    else:
        index = pd.Index(np.arange(first, last).astype(str))
    if archive.obs is None or not archive.obs.names:
        return pd.DataFrame(index=index)
    columns = {name: archive.obs.column(name) for name in archive.obs.names}
    return pa.table(columns).slice(first, last - first).to_pandas().set_axis(index, axis=0)
