"""Writes one random matrix in every way that AnnData stores occur: zarr 2 and 3, HDF5, any codec and type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from hypothesis import strategies as st
from numcodecs import Blosc, GZip, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

CODECS = ("none", "zstd", "gzip", "blosc-lz4", "blosc-zstd", "zstd+crc32c")


@dataclass(frozen=True)
class How:
    """How a matrix is stored.

    Attributes
    ----------
    container
        ``"zarr2"``, ``"zarr3"`` or ``"hdf5"``.
    codec
        One of `CODECS`; HDF5 takes gzip, and lzf for all others but none.
    data, indices, indptr
        dtypes, of any byte order.
    chunk, chunks_per_shard
        Elements of a chunk; chunks of a shard, 0 without shards.
    dense
        Stored as an array of two axes.
    """

    container: str
    codec: str
    data: str
    indices: str
    indptr: str
    chunk: int
    chunks_per_shard: int
    dense: bool


@st.composite
def hows(draw: st.DrawFn) -> How:
    """Any way of storing."""
    order = draw(st.sampled_from("<>"))
    return How(
        draw(st.sampled_from(["zarr2", "zarr3", "hdf5"])),
        draw(st.sampled_from(CODECS)),
        order + draw(st.sampled_from(["f4", "f8", "i4", "i8", "u2", "i1", "f2"])),
        order + draw(st.sampled_from(["i4", "i8", "u2", "u4"])),
        order + draw(st.sampled_from(["i4", "i8"])),
        draw(st.integers(1, 90)),
        draw(st.integers(0, 3)),
        draw(st.booleans()),
    )


def random_matrix(seed: int, n_cells: int, n_genes: int, *, sorted_columns: bool) -> sp.csr_matrix:
    """Small counts, every third row empty at random."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 4, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.4)
    dense[rng.random(n_cells) < 0.3] = 0
    matrix = sp.csr_matrix(dense)
    if not sorted_columns:
        for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
            order = rng.permutation(b - a)
            matrix.indices[a:b], matrix.data[a:b] = matrix.indices[a:b][order], matrix.data[a:b][order]
        matrix.has_sorted_indices = False
    return matrix


def write(path: Path, matrix: sp.csr_matrix, how: How) -> None:
    """A store with `matrix` as X, whose obs and var anndata wrote."""
    obs = pd.DataFrame({"n": np.arange(matrix.shape[0])}, index=[f"c{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])])
    shell = anndata.AnnData(obs=obs, var=var)
    if how.container == "hdf5":
        shell.write_h5ad(path)
        with h5py.File(path, "a") as file:
            _fill(file, matrix, how, _hdf5_array)
        return
    with anndata.settings.override(zarr_write_format=int(how.container[-1])):
        shell.write_zarr(path)
    _fill(zarr.open_group(str(path), mode="a", use_consolidated=False), matrix, how, _zarr_array)


def _fill(root: Any, matrix: sp.csr_matrix, how: How, make: Any) -> None:
    if "X" in root:
        del root["X"]
    if how.dense:
        make(root, "X", matrix.toarray().astype(how.data), how)
        root["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        return
    group = root.create_group("X")
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(map(int, matrix.shape))}
    )
    for name in ("data", "indices", "indptr"):
        make(group, name, getattr(matrix, name).astype(getattr(how, name)), how)


def _chunks(values: np.ndarray, how: How) -> tuple[int, ...]:
    return tuple(max(1, min(how.chunk, n)) for n in values.shape)


def _hdf5_array(group: h5py.Group, name: str, values: np.ndarray, how: How) -> None:
    if not values.size or how.codec == "none":
        group.create_dataset(name, data=values)
        return
    compression = "gzip" if how.codec == "gzip" else "lzf"
    group.create_dataset(
        name, data=values, chunks=_chunks(values, how), compression=compression, shuffle=True
    )


def _zarr_array(group: Any, name: str, values: np.ndarray, how: How) -> None:
    chunks = _chunks(values, how)
    options: dict[str, Any] = {"shape": values.shape, "dtype": values.dtype, "chunks": chunks}
    if how.container == "zarr2":
        blosc = Blosc(cname=how.codec.removeprefix("blosc-"), shuffle=1, blocksize=64)
        two: dict[str, Any] = {"gzip": GZip(1), "zstd": Zstd(1), "zstd+crc32c": Zstd(1), "none": None}
        array = group.create_array(name, compressors=two.get(how.codec, blosc), **options)
    else:
        three: dict[str, list[Any]] = {
            "gzip": [GzipCodec(level=1)],
            "zstd": [ZstdCodec(level=1)],
            "zstd+crc32c": [ZstdCodec(level=1), Crc32cCodec()],
            "none": [],
            "blosc-lz4": [BloscCodec(cname="lz4", blocksize=64)],
            "blosc-zstd": [BloscCodec(cname="zstd", blocksize=64)],
        }
        shards = tuple(c * how.chunks_per_shard for c in chunks) if how.chunks_per_shard else None
        array = group.create_array(name, shards=shards, compressors=three[how.codec], **options)
    array[...] = values
