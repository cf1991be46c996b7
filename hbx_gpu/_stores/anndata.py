"""AnnData and MuData in zarr or HDF5, of any release, and annbatch collections."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._h5ad.matrix import two_axes
from hbx_gpu._stores.matrix import Form, StoredMatrix
from hbx_gpu._stores.store import RAW, Part, Store
from hbx_gpu._stores.tree import Tree
from hbx_gpu.errors import CorruptDataError, InvalidDataError, UnsupportedCodecError

if TYPE_CHECKING:
    import pandas as pd

_FORMS: dict[str, Form] = {"csr_matrix": "csr", "csr": "csr", "csc_matrix": "csc", "csc": "csc"}
_COLLECTION = re.compile(r"dataset_(\d+)")


def open_anndata(tree: Tree, kind: str) -> Store:
    """A store that is one AnnData."""
    return Store(tree.path, f"AnnData {kind}", [part_of(tree, "")])


def open_collection(tree: Tree) -> Store:
    """An annbatch collection: groups ``dataset_0``, ``dataset_1``, ..., each one AnnData.

    Raises
    ------
    CorruptDataError
        A number is missing between them.
    InvalidDataError
        There are none.
    """
    found = {int(m[1]): name for name in tree.names() if (m := _COLLECTION.fullmatch(name))}
    if not found:
        raise InvalidDataError(
            f"{tree.path} is marked as an annbatch collection and holds no group dataset_0; was it "
            "written to the end?"
        )
    if sorted(found) != list(range(len(found))):
        raise CorruptDataError(
            f"{tree.path}: expected groups dataset_0 to dataset_{max(found)}, found {len(found)} of them: "
            f"{sorted(found.values())}"
        )
    return Store(tree.path, "annbatch collection", [part_of(tree, found[n]) for n in sorted(found)])


def open_mudata(tree: Tree, kind: str) -> Store:
    """A MuData: modalities that share cells.

    Raises
    ------
    InvalidDataError
        Its parts share features instead of cells.
    CorruptDataError
        The table of which cell is which row of a modality contradicts the modality.
    """
    if tree.attributes().get("axis") == 1:
        raise InvalidDataError(
            f"{tree.path}: its parts share features and not cells (axis=1); write each part to a file of its "
            "own and open these files together"
        )
    there = tree.names("mod")
    order = np.ravel(np.asarray(tree.attributes("mod").get("mod-order", ()), object)).astype(str).tolist()
    names = [*(name for name in order if name in there), *(name for name in there if name not in order)]
    modalities = {}
    n_cells = tree.n_rows("obs")
    if n_cells is None:
        n_cells = len(_obs(tree, ""))
    for name in names:
        part = part_of(tree, f"mod/{name}")
        rows = (
            tree.array(f"obsmap/{name}").astype(np.int64).ravel() - 1
            if name in tree.names("obsmap")
            else None
        )
        if rows is None:
            rows = np.arange(n_cells)
        if len(rows) != n_cells or rows.min(initial=-1) < -1 or rows.max(initial=-1) >= part.n_cells:
            raise CorruptDataError(
                f"{tree.path}: obsmap/{name} has {len(rows)} entries up to {rows.max(initial=-1) + 1} for "
                f"{n_cells} cells and {part.n_cells} rows of the modality"
            )
        modalities[name] = (part, rows)
    return Store(tree.path, f"MuData {kind}", [], modalities, lambda: _own_obs(tree, names))


def part_of(tree: Tree, root: str) -> Part:
    """The AnnData at `root` of a store.

    Raises
    ------
    CorruptDataError
        Arrays that contradict each other.
    InvalidDataError
        No obs, no var or no matrix.
    """
    path, prefix = tree.path, f"{root}/" if root else ""
    name = f"{path}:{root}" if root else str(path)
    there = tree.names(root)
    if not {"obs", "var"} <= set(there):
        raise InvalidDataError(f"{name} is not an AnnData: expected obs and var, found {there or 'nothing'}")
    # Until 0.7, anndata wrote raw as raw.X and raw.var beside X and var.
    raw = f"{prefix}raw." if "raw.X" in there or tree.is_array(f"{prefix}raw.X") else f"{prefix}raw/"
    keys = {"X": f"{prefix}X", RAW: f"{raw}X"}
    layers = _layers(tree, f"{prefix}layers")
    matrices, unreadable = {}, {}
    for matrix, key in (keys | layers).items():
        if not (tree.is_array(key) or tree.names(key)):
            continue
        try:
            matrices[matrix] = _matrix(tree, key, f"{name}, matrix {matrix!r}")
        except (InvalidDataError, UnsupportedCodecError) as error:
            # A layer that no loader can read does not keep anybody from the others.
            if matrix not in layers:
                raise
            unreadable[matrix] = error
    tables = {"var": f"{prefix}var", RAW: f"{raw}var"}
    _check_tables(tree, f"{prefix}obs", tables, name, matrices)
    return Part(
        name,
        matrices,
        lambda: _obs(tree, prefix),
        lambda matrix: _frame(tree, tables[RAW if matrix == RAW else "var"]),
        unreadable,
    )


def _layers(tree: Tree, key: str) -> dict[str, str]:
    """Layer -> its key. A name that contains slashes is stored as groups inside each other."""
    found: dict[str, str] = {}
    for name in tree.names(key):
        inner = f"{key}/{name}"
        is_folder = (
            not tree.is_array(inner) and not tree.attributes(inner) and "data" not in tree.names(inner)
        )
        if is_folder:
            found |= {f"{name}/{rest}": place for rest, place in _layers(tree, inner).items()}
        else:
            found[name] = inner
    return found


def _check_tables(
    tree: Tree, obs: str, var: dict[str, str], name: str, matrices: dict[str, StoredMatrix]
) -> None:
    """obs and var have a row for each cell and each feature, as far as metadata tell."""
    for matrix, stored in matrices.items():
        for table, axis in ((obs, 0), (var[RAW if matrix == RAW else "var"], 1)):
            n = tree.n_rows(table)
            if n is not None and n != stored.shape[axis]:
                raise CorruptDataError(
                    f"{name}: {table} has {n} rows, but matrix {matrix!r} has shape {stored.shape}"
                )


def _matrix(tree: Tree, key: str, name: str) -> StoredMatrix:
    if tree.is_array(key):
        values = tree.layout(key)
        if len(values.shape) != 2:
            raise InvalidDataError(f"{name} has shape {values.shape}; two axes are expected")
        return StoredMatrix(name, (values.shape[0], values.shape[1]), "dense", values)
    attributes = tree.attributes(key)
    encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    axes = two_axes(shape)
    if encoding not in _FORMS or axes is None:
        raise InvalidDataError(
            f"{name}: expected a CSR, CSC or dense matrix with its shape, found encoding {encoding!r} and "
            f"shape {shape}"
        )
    missing = {"data", "indices", "indptr"} - set(tree.names(key))
    if missing:
        raise CorruptDataError(f"{name}: arrays {sorted(missing)} are missing")
    values, index, indptr = (tree.layout(f"{key}/{part}") for part in ("data", "indices", "indptr"))
    return StoredMatrix(name, axes, _FORMS[encoding], values, index, indptr)


def _frame(closed: Tree, key: str) -> pd.DataFrame:
    with closed.again() as tree:
        return tree.frame(key)


def _obs(tree: Tree, prefix: str) -> pd.DataFrame:
    return _frame(tree, f"{prefix}obs")


def _own_obs(tree: Tree, modalities: list[str]) -> pd.DataFrame:
    """The common table of a MuData without the copies ``modality:column`` that it keeps of its parts."""
    frame = _obs(tree, "")
    copies = [name for name in frame.columns if name.split(":", 1)[0] in modalities and ":" in name]
    return frame.drop(columns=copies)
