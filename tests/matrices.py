"""Random ragged collections: CSR matrices written as zarr groups with any chunks, shards and codecs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import zarr
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs.numcodecs import LZ4, Zlib

from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.metadata import read_layout

CODECS = ("hbx_gpu.rowpack", "homeobox.bitpacking", "zstd", "blosc", "gzip", "none")


@dataclass
class Group:
    """One stored matrix and how it is stored."""

    matrix: sp.csr_matrix  # local columns, as stored: unsorted, explicit zeros and all
    remap: np.ndarray
    codec: str = "homeobox.bitpacking"
    chunk: int = 128
    chunks_per_shard: int = 0  # 0 = not sharded
    lead: int = 0  # elements in front that no row points to
    order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def _compressors(codec: str, transform: str, itemsize: int) -> list[object]:
    if codec == "homeobox.bitpacking":
        from hbx_gpu._codecs.zarr_codec import BitpackingCodec

        return [BitpackingCodec(transform=transform, element_size=4)]
    if codec == "hbx_gpu.rowpack":
        from hbx_gpu._codecs.zarr_codec import RowpackCodec

        return [RowpackCodec(transform="gaps" if transform == "delta" else "none", element_size=itemsize)]
    name, _, checksum = codec.partition("+")
    found: list[object] = {
        "zstd": [ZstdCodec(level=0)],
        "blosc": [BloscCodec(cname="lz4")],
        "blosc-lz4-bits": [BloscCodec(cname="lz4", shuffle="bitshuffle", blocksize=256)],
        "blosc-zstd-bytes": [BloscCodec(cname="zstd", shuffle="shuffle", blocksize=256)],
        "blosc-zlib": [BloscCodec(cname="zlib", shuffle="noshuffle")],
        "blosc-blosclz": [BloscCodec(cname="blosclz")],
        "lz4": [LZ4()],
        "zlib": [Zlib()],
        "gzip": [GzipCodec(level=1)],
        "none": [],
    }[name]
    return [*found, Crc32cCodec()] if checksum else found


def write_array(path: Path, data: np.ndarray, group: Group, transform: str) -> None:
    """One 1-D array of `group`."""
    common = {"store": str(path), "shape": data.shape, "dtype": data.dtype, "fill_value": 0}
    codec = group.codec
    if codec == "homeobox.bitpacking" and (data.dtype.itemsize * group.chunk) % 4:
        codec = "zstd"
    if codec == "hbx_gpu.rowpack" and data.dtype.kind != "u":
        codec = "zstd"  # floats and signed integers keep a general codec
    array = zarr.create_array(
        **common,
        chunks=(group.chunk,),
        shards=(group.chunk * group.chunks_per_shard,) if group.chunks_per_shard else None,
        compressors=_compressors(codec, transform, data.dtype.itemsize),
        serializer=BytesCodec(),
        filters=None,
    )
    array[:] = data


def write_sources(root: Path, groups: list[Group], layer: str = "counts") -> tuple[list[Source], RowIndex]:
    """Write `groups` under `root`; every stored row becomes a row of the index, group after group."""
    sources, parts = [], []
    for g, group in enumerate(groups):
        matrix = group.matrix
        folder = root / f"g{g}"
        lead = np.zeros(group.lead)
        write_array(
            folder / "csr/indices",
            np.concatenate([lead.astype(np.uint32), matrix.indices.astype(np.uint32)]),
            group,
            "delta",
        )
        write_array(
            folder / f"csr/layers/{layer}",
            np.concatenate([lead.astype(matrix.dtype), matrix.data]),
            group,
            "none",
        )
        sources.append(
            Source(
                name=f"g{g}",
                index=read_layout(folder / "csr/indices", f"g{g}/csr/indices"),
                layers={layer: read_layout(folder / f"csr/layers/{layer}", f"g{g}/csr/layers/{layer}")},
                remap=group.remap,
            )
        )
        start = matrix.indptr[:-1].astype(np.int64) + group.lead
        parts.append((np.full(matrix.shape[0], g, np.int32), start, np.diff(matrix.indptr).astype(np.int32)))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return sources, RowIndex(*columns)


def expected_dense(groups: list[Group], n_features: int) -> np.ndarray:
    """Every row in output columns, straight from the matrices (float64; repeated columns are summed)."""
    blocks = []
    for group in groups:
        matrix = group.matrix
        out = np.zeros((matrix.shape[0], n_features))
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        columns = group.remap[matrix.indices]
        keep = columns >= 0
        np.add.at(out, (rows[keep], columns[keep]), matrix.data[keep].astype(np.float64))
        blocks.append(out)
    return np.concatenate(blocks)


@st.composite
def ragged_groups(draw: st.DrawFn, codecs: tuple[str, ...] = CODECS) -> tuple[list[Group], int]:
    """Up to four groups over a common feature space; returns (groups, n_features)."""
    n_features = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtypes = draw(
        st.lists(
            st.sampled_from([np.uint32, np.uint16, np.uint64, np.int64, np.float32]), min_size=1, max_size=4
        )
    )
    groups = []
    for dtype in dtypes:
        m = draw(st.integers(1, n_features))
        n = draw(st.integers(1, 30))
        density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        mask = rng.random((n, m)) < density
        mask[rng.random(n) < 0.2] = False
        indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
        indices = np.nonzero(mask)[1]
        for a, b in pairwise(indptr):  # stored order need not be ascending
            rng.shuffle(indices[a:b])
        high = 2**16 if dtype is np.uint16 else 2**31
        data = rng.integers(0, rng.choice([2, 200, high]), size=len(indices)).astype(dtype)
        remap = rng.permutation(n_features)[:m].astype(np.int32)
        if draw(st.booleans()):
            remap[rng.random(m) < 0.3] = -1
        matrix = sp.csr_matrix((n, m), dtype=dtype)
        matrix.data, matrix.indices, matrix.indptr = data, indices.astype(np.int32), indptr.astype(np.int32)
        groups.append(
            Group(
                matrix=matrix,
                remap=remap,
                codec=draw(st.sampled_from(codecs)),
                chunk=draw(st.sampled_from([1, 5, 32, 128, 200, 1000])),
                chunks_per_shard=draw(st.sampled_from([0, 1, 3, 16])),
                lead=draw(st.sampled_from([0, 1, 130])),
            )
        )
    return groups, n_features
