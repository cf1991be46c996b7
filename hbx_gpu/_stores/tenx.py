"""Matrices as 10x Genomics' Cell Ranger writes them (HDF5, versions 2 and 3), and CellBender after it.

Columns of the stored CSC matrix are barcodes, so its arrays are the CSR arrays of cells by features. Layout:
"Feature-Barcode Matrices", Cell Ranger documentation; fields checked against files of both versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu._stores.store import Part, Store
from hbx_gpu._stores.tree import Tree
from hbx_gpu.errors import CorruptDataError

if TYPE_CHECKING:
    import pandas as pd

_NEEDS = {"barcodes", "data", "indices", "indptr", "shape"}


def groups_of(tree: Tree) -> list[str]:
    """Groups that hold such a matrix: ``matrix`` (version 3), or one per genome (version 2)."""
    return [key for key in tree.names() if set(tree.names(key)) >= _NEEDS]


def open_tenx(tree: Tree) -> Store:
    """A Cell Ranger file; genomes of a version 2 file follow one another."""
    return Store(tree.path, "10x Genomics HDF5", [_part(tree, key) for key in groups_of(tree)])


def _part(tree: Tree, key: str) -> Part:
    name = f"{tree.path}:{key}"
    shape = tree.array(f"{key}/shape").astype(np.int64).ravel()
    if len(shape) != 2:
        raise CorruptDataError(f"{name}: shape has {len(shape)} entries; features and barcodes are expected")
    values, index, indptr = (tree.layout(f"{key}/{part}") for part in ("data", "indices", "indptr"))
    ids = f"{key}/features/id" if tree.names(f"{key}/features") else f"{key}/genes"
    for table, n in ((f"{key}/barcodes", int(shape[1])), (ids, int(shape[0]))):
        if not tree.is_array(table) or tree.shape(table) != (n,):
            found = tree.shape(table) if tree.is_array(table) else "nothing"
            raise CorruptDataError(
                f"{tree.path}: {table} should name {n} barcodes or features, as shape says; found {found}"
            )
    matrix = StoredMatrix(name, (int(shape[1]), int(shape[0])), "csr", values, index, indptr)
    return Part(name, {"X": matrix}, lambda: _obs(tree, key), lambda _: _var(tree, key))


def _obs(closed: Tree, key: str) -> pd.DataFrame:
    import pandas as pd

    with closed.again() as tree:
        return pd.DataFrame(index=pd.Index(tree.array(f"{key}/barcodes").astype(str)))


def _var(closed: Tree, key: str) -> pd.DataFrame:
    """Features by id, their other fields as columns (``feature_type``, ``genome``, ``name``, ...)."""
    import pandas as pd

    with closed.again() as tree:
        if not tree.names(f"{key}/features"):
            ids = tree.array(f"{key}/genes").astype(str)
            return pd.DataFrame({"name": tree.array(f"{key}/gene_names").astype(str)}, index=pd.Index(ids))
        ids = tree.array(f"{key}/features/id").astype(str)
        columns = {}
        for name in tree.names(f"{key}/features"):
            if not tree.is_array(f"{key}/features/{name}"):
                continue  # probe sets of Visium are a group
            field = tree.array(f"{key}/features/{name}")
            if name != "id" and len(field) == len(ids):  # others list what fields there are
                columns[name] = field.astype(str) if field.dtype.kind == "O" else field
        return pd.DataFrame(columns, index=pd.Index(ids))
