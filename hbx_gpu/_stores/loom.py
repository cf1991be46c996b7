"""Loom files: a dense matrix of genes by cells in HDF5, layers beside it, attributes of both axes.

A cell is a column of what is stored. Chunks are described as those of the transposed matrix, in Fortran
order, so that nothing is copied. Layout: the Loom file format specification, versions 1 to 3.
"""

from __future__ import annotations

import html
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._source import ArrayLayout, ChunkTable
from hbx_gpu._storage.chunks import chunk_grid
from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu._stores.store import Part, Store
from hbx_gpu._stores.tree import Tree
from hbx_gpu.errors import CorruptDataError, InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_CELL_NAMES = ("CellID", "obs_names")
_GENE_NAMES = ("Gene", "var_names")


def open_loom(tree: Tree) -> Store:
    """A loom file.

    Raises
    ------
    InvalidDataError
        It has no ``/matrix``.
    """
    path = tree.path
    if not tree.is_array("matrix"):
        raise InvalidDataError(
            f"{path} is not a loom file: it has attributes of rows and columns but no /matrix"
        )
    keys = {"X": "matrix"} | {layer: f"layers/{layer}" for layer in tree.names("layers")}
    matrices = {}
    for name, key in keys.items():
        values = transposed(tree.layout(key))
        where = f"{path}, matrix {name!r}"
        matrices[name] = StoredMatrix(where, (values.shape[0], values.shape[1]), "dense", values)
    n_cells, n_genes = matrices["X"].shape
    part = Part(
        str(path),
        matrices,
        lambda: _attributes(tree, "col_attrs", _CELL_NAMES, n_cells),
        lambda _: _attributes(tree, "row_attrs", _GENE_NAMES, n_genes),
    )
    return Store(path, "loom", [part])


def transposed(layout: ArrayLayout) -> ArrayLayout:
    """A matrix with its axes exchanged: every chunk is the same bytes, in Fortran order.

    Raises
    ------
    CorruptDataError
        Not a matrix.
    """
    if len(layout.shape) != 2:
        raise CorruptDataError(f"array {layout.name!r} has shape {layout.shape}; two axes are expected")
    if layout.table is None:
        raise InvalidDataError(f"array {layout.name!r} has no table of chunks")
    order = np.arange(math.prod(chunk_grid(layout))).reshape(chunk_grid(layout)).T.ravel()
    table = layout.table
    skipped = None if table.skipped is None else table.skipped[order]
    chain = {**layout.codecs[0]["configuration"], "order": "F"}
    return replace(
        layout,
        shape=layout.shape[::-1],
        chunk_shape=layout.chunk_shape[::-1],
        shard_shape=layout.shard_shape[::-1],
        codecs=({"name": layout.codecs[0]["name"], "configuration": chain},),
        table=ChunkTable(table.offset[order], table.nbytes[order], skipped),
    )


def _attributes(closed: Tree, key: str, names: tuple[str, ...], n: int) -> pd.DataFrame:
    """Attributes of one axis; those of several columns are left out, which no table can hold."""
    import pandas as pd

    path = closed.path
    with closed.again() as tree:
        columns: dict[str, np.ndarray] = {}
        for name in tree.names(key):
            values = tree.array(f"{key}/{name}")
            if values.ndim > 1 and values.shape[1:] != (1,):
                continue
            if len(values) != n:
                raise CorruptDataError(f"{path}: {key}/{name} has {len(values)} entries for {n}")
            values = values.reshape(n)
            if values.dtype.kind == "O":
                values = np.array([html.unescape(v) for v in values.tolist()], object)
            columns[name] = values
    index = next((columns.pop(name) for name in names if name in columns), np.arange(n).astype(str))
    return pd.DataFrame(columns, index=pd.Index(np.asarray(index).astype(str)))
