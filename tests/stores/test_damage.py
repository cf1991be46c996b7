"""Damaged, unknown and changing stores: an error that names the place, never a wrong number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import hbx_gpu
from hbx_gpu._h5ad.files import H5adFile
from hbx_gpu.errors import CorruptDataError, HbxError, InvalidDataError
from tests.stores.small import chunk_file, put, rows_of, small, written


def replaced(path: Path, name: str, values: np.ndarray) -> None:
    """A store whose array `name` holds other values."""
    data = small()
    if path.suffix == ".zarr":
        put(written(path, data), name, values, chunks=(4,))
        return
    data.write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = values


def indptr(change: str) -> np.ndarray:
    found = small().X.indptr.astype(np.int64)
    if change == "descends":
        found[3] = found[2] - 1
    elif change == "runs from 1":
        found[0] = 1
    elif change == "runs from 0":
        found[-1] += 1
    elif change == "13 entries":
        found = found[:-1]
    elif change == "integers are expected":
        found = found.astype(np.float64)
    result: np.ndarray = found
    return result


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize(
    "change", ["descends", "runs from 1", "runs from 0", "13 entries", "integers are expected"]
)
def test_row_pointers(tmp_path: Path, name: str, change: str) -> None:
    replaced(tmp_path / name, "X/indptr", indptr(change))
    with pytest.raises(CorruptDataError, match=change):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize(("column", "dtype"), [(7, "i4"), (-1, "i4"), (2**32 + 1, "i8"), (2**63 + 2, "u8")])
def test_column_numbers(tmp_path: Path, name: str, column: int, dtype: str) -> None:
    """Those too that become a column number when they are cut to 32 bits."""
    indices = small().X.indices.astype(dtype)
    indices[2] = np.array(column, dtype)
    replaced(tmp_path / name, "X/indices", indices)
    with pytest.raises(CorruptDataError, match="indices"):
        rows_of(tmp_path / name)


def shorter(file: h5py.File, name: str) -> None:
    values = file[name][:-1]
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


CONTRADICTIONS: dict[str, Callable[[h5py.File], Any]] = {
    "obs has 11 rows": lambda file: shorter(file, "obs/_index"),
    "var has 6 rows": lambda file: shorter(file, "var/_index"),
    "11 rows need 12 entries": lambda file: file["layers/l"].attrs.modify("shape", [11, 7]),
    "13 rows need 14 entries": lambda file: file["X"].attrs.modify("shape", [13, 7]),
    "var has 7 rows, but matrix 'X'": lambda file: file["X"].attrs.modify("shape", [12, 6]),
    "should be equally long": lambda file: shorter(file, "X/data"),
    "is its index, and lacks it": lambda file: file.__delitem__("obs/_index"),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_shapes_that_contradict_each_other(tmp_path: Path, message: str) -> None:
    data = small()
    data.layers["l"] = data.X * 2
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        CONTRADICTIONS[message](file)
    with pytest.raises(CorruptDataError, match=message):
        rows_of(tmp_path / "a.h5ad")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize("shape", [12, "12 x 7", [12, 7, 1]])
def test_shapes_that_are_none(tmp_path: Path, name: str, shape: object) -> None:
    path = tmp_path / name
    if path.suffix == ".zarr":
        written(path, small())["X"].attrs["shape"] = shape
    else:
        small().write_h5ad(path)
        with h5py.File(path, "a") as file:
            file["X"].attrs["shape"] = shape
        with H5adFile(path) as opened, pytest.raises(InvalidDataError, match="and shape"):
            opened.matrix("X")
    with pytest.raises(InvalidDataError, match="and shape"):
        rows_of(path)


def test_tables_that_contradict_themselves(tmp_path: Path) -> None:
    data = small()
    data.obs["t"] = pd.Categorical(["a", "b"] * 6)
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["obs/t/codes"][3] = 5
    data.write_h5ad(tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "b.h5ad", "a") as file:
        shorter(file, "obs/k")
    for name in ("a.h5ad", "b.h5ad"):
        with pytest.raises(CorruptDataError, match="table 'obs'"):
            hbx_gpu.open(tmp_path / name).to_cell_dataset(metadata_columns=["k"])


def test_a_lost_chunk_of_columns_is_no_chunk_of_zeros(tmp_path: Path) -> None:
    """Each of its elements would be the first of a row; here one is not, whichever row is read."""
    x = sp.csr_matrix(np.array([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0]], np.float32))
    root = written(tmp_path / "a.zarr", anndata.AnnData(x))
    put(root, "X/indices", x.indices, chunks=(5,))
    chunk_file(tmp_path / "a.zarr" / "X" / "indices", 1).unlink()
    dataset = hbx_gpu.open(tmp_path / "a.zarr").to_cell_dataset()
    for row in (0, 1):
        with pytest.raises(CorruptDataError, match="missing"):
            dataset[[row]]


def test_a_skipped_chunk_of_columns_is_one_of_zeros(tmp_path: Path) -> None:
    x = sp.csr_matrix(np.eye(12, 3, dtype=np.float32)[[0] * 6 + [1] * 6])
    root = written(tmp_path / "a.zarr", anndata.AnnData(x))
    put(root, "X/indices", x.indices, chunks=(4,), config={"write_empty_chunks": False})
    put(root, "X/data", x.data, chunks=(4,))
    np.testing.assert_array_equal(rows_of(tmp_path / "a.zarr"), x.toarray())


def test_a_column_chunk_that_hdf5_never_wrote(tmp_path: Path) -> None:
    """Only rows in it are lost."""
    data = small()
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        del file["X/indices"]
        array = file.create_dataset("X/indices", shape=data.X.indices.shape, dtype="i4", chunks=(20,))
        array[:20] = data.X.indices[:20]
    dataset: Any = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()
    np.testing.assert_array_equal(dataset[[0, 1]].indices, data.X[:2].indices)
    with pytest.raises(CorruptDataError, match="missing"):
        dataset[[11]]


@pytest.mark.parametrize("change", [lambda raw: raw[:-3], lambda raw: raw + b"abc"])
@pytest.mark.parametrize("codec", ["none", "zstd", "blosc", "sharded"])
def test_chunks_of_the_wrong_length(tmp_path: Path, codec: str, change: Callable[[bytes], bytes]) -> None:
    data = small()
    compressors = {"zstd": zarr.codecs.ZstdCodec(), "blosc": zarr.codecs.BloscCodec()}.get(codec)
    shards = {"shards": (10,)} if codec == "sharded" else {}
    put(
        written(tmp_path / "a.zarr", data),
        "X/data",
        data.X.data,
        chunks=(5,),
        compressors=compressors,
        **shards,
    )
    file = chunk_file(tmp_path / "a.zarr" / "X" / "data", 0)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CorruptDataError, match="X/data"):
        rows_of(tmp_path / "a.zarr")


EXTENSIONS: dict[str, dict[str, Any]] = {
    "acme.magic": {
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "acme.magic"}]
    },
    "rectilinear": {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shapes": [[3, 3]]}}},
    "storage_transformers": {"storage_transformers": [{"name": "acme"}]},
    "complex64": {"data_type": "complex64"},
    "acme.int4": {"data_type": {"name": "acme.int4", "configuration": {"bits": 4}}},
    "acme_extension": {"acme_extension": {"name": "x", "must_understand": True}},
    "acme.suffix": {"chunk_key_encoding": {"name": "acme.suffix"}},
    "zarr_format is 4": {"zarr_format": 4},
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_that_nobody_here_knows(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a.zarr", small())
    path = tmp_path / "a.zarr" / "X" / "data" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | EXTENSIONS[name]))
    with pytest.raises(HbxError, match=name.replace(".", r"\.")):
        rows_of(tmp_path / "a.zarr")


def test_extensions_that_nobody_has_to_know(tmp_path: Path) -> None:
    data = small()
    written(tmp_path / "a.zarr", data)
    path = tmp_path / "a.zarr" / "X" / "data" / "zarr.json"
    document = json.loads(path.read_text())
    document |= {"acme": {"name": "x", "must_understand": False}, "data_type": {"name": "float32"}}
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(rows_of(tmp_path / "a.zarr"), data.X.toarray())


def test_groups_of_a_format_to_come(tmp_path: Path) -> None:
    written(tmp_path / "a.zarr", small())
    path = tmp_path / "a.zarr" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zarr_format": 4}))
    with pytest.raises(InvalidDataError, match="zarr_format 4"):
        rows_of(tmp_path / "a.zarr")


_WRITER = "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print(1, flush=True); sys.stdin.read()"


def test_a_file_that_another_process_writes(tmp_path: Path) -> None:
    small().write_h5ad(tmp_path / "a.h5ad")
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "a.h5ad")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(InvalidDataError, match="another program has it open for writing"):
            hbx_gpu.open(tmp_path / "a.h5ad")
        writer.communicate(b"")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def another(path: Path) -> None:
    small().write_h5ad(path.with_name("b.h5ad"))
    os.replace(path.with_name("b.h5ad"), path)


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize(
    "change", [append, another, lambda path: os.utime(path, ns=(1, 1)), lambda path: os.truncate(path, 5_000)]
)
def test_a_file_that_changes_after_opening(
    tmp_path: Path, compression: Any, change: Callable[[Path], None]
) -> None:
    """Its size, its inode or its time of change."""
    small().write_h5ad(tmp_path / "a.h5ad", compression=compression)
    dataset = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()
    dataset[[0]]
    change(tmp_path / "a.h5ad")
    with pytest.raises(CorruptDataError, match="changed by another program"):
        dataset[[1]]


def tenx(path: Path, **changes: Any) -> None:
    x = small().X.astype(np.int32)
    arrays: dict[str, Any] = {
        "data": x.data, "indices": x.indices, "indptr": x.indptr, "shape": np.array([7, 12]),
        "barcodes": np.array([b"b%d" % i for i in range(12)]),
        "features/id": np.array([b"E%d" % i for i in range(7)]),
        "features/name": np.array([b"N%d" % i for i in range(7)]),
    } | changes  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is None:
                continue
            file[f"matrix/{name}"] = values


def test_files_of_10x_that_contradict_themselves(tmp_path: Path) -> None:
    tenx(tmp_path / "a.h5")
    np.testing.assert_array_equal(rows_of(tmp_path / "a.h5"), small().X.toarray())
    # Files of Visium list their probe sets in a group beside the fields.
    tenx(tmp_path / "visium.h5", **{"features/target_sets/Probe Set": np.arange(3)})
    np.testing.assert_array_equal(rows_of(tmp_path / "visium.h5"), small().X.toarray())
    for changes in (
        {"features/id": None, "features/id/x": np.arange(7)},
        {"shape": np.array([12, 7])},
        {"barcodes": np.array([b"b"] * 11)},
        {"features/id": np.array([b"E"] * 6)},
    ):
        tenx(tmp_path / "b.h5", **changes)
        with pytest.raises(CorruptDataError, match="matrix/"):
            rows_of(tmp_path / "b.h5")


def test_collections_with_gaps(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "c"), mode="w").attrs["annbatch-preshuffled"] = "0.1.0"
    with pytest.raises(InvalidDataError, match="no group dataset_0"):
        rows_of(tmp_path / "c")
    for number in (0, 2):
        small().write_zarr(tmp_path / "c" / f"dataset_{number}")
    with pytest.raises(CorruptDataError, match="dataset_0 to dataset_2"):
        rows_of(tmp_path / "c")
