"""CSR matrices as zarr groups with any chunks, shards and codecs, and what their rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.codecs.numcodecs import LZ4, Zlib

from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.metadata import read_layout

CODECS = ("hbx_gpu.rowpack", "homeobox.bitpacking", "zstd", "blosc", "gzip", "none")
"""Names for `StoredGroup.codec`."""


@dataclass
class StoredGroup:
    """One matrix and how it is stored.

    Attributes
    ----------
    matrix
        Rows over local columns, stored as they are: unsorted columns, explicit zeros and all.
    remap
        int32, (n_columns,). Local column -> output column, -1 to drop it.
    codec
        One of :data:`CODECS`.
    chunk, chunks_per_shard
        Values per chunk; chunks per shard, 0 for an array that is not sharded.
    lead
        Values in front of the first row, which no row points to.
    """

    matrix: sp.csr_matrix
    remap: np.ndarray
    codec: str = "homeobox.bitpacking"
    chunk: int = 128
    chunks_per_shard: int = 0
    lead: int = 0


def compressors(codec: str, transform: str, itemsize: int) -> list[BytesBytesCodec]:
    if codec == "homeobox.bitpacking":
        from hbx_gpu._codecs.zarr_codec import BitpackingCodec

        return [BitpackingCodec(transform=transform, element_size=4)]
    if codec == "hbx_gpu.rowpack":
        from hbx_gpu._codecs.zarr_codec import RowpackCodec

        return [RowpackCodec(transform="gaps" if transform == "delta" else "none", element_size=itemsize)]
    name, _, checksum = codec.partition("+")
    by_name: dict[str, list[BytesBytesCodec]] = {
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
    }
    return [*by_name[name], Crc32cCodec()] if checksum else by_name[name]


def write_array(path: Path, data: np.ndarray, group: StoredGroup, transform: str) -> None:
    """One 1-D array of `group`."""
    codec = group.codec
    if codec == "homeobox.bitpacking" and (data.dtype.itemsize * group.chunk) % 4:
        codec = "zstd"
    if codec == "hbx_gpu.rowpack" and data.dtype.kind != "u":
        codec = "zstd"  # floats and signed integers keep a general codec
    array = zarr.create_array(
        store=str(path),
        shape=data.shape,
        dtype=data.dtype,
        fill_value=0,
        chunks=(group.chunk,),
        shards=(group.chunk * group.chunks_per_shard,) if group.chunks_per_shard else None,
        compressors=compressors(codec, transform, data.dtype.itemsize),
        serializer=BytesCodec(),
        filters=None,
    )
    array[:] = data


def write_sources(
    root: Path, groups: list[StoredGroup], layer: str = "counts"
) -> tuple[list[Source], RowIndex]:
    """Write matrices below a folder.

    Parameters
    ----------
    root
        The folder; group number i becomes ``root/gi``.
    groups
        The matrices.
    layer
        Name of the layer that holds their values.

    Returns
    -------
    sources, rows
        One Source per group, and an index with every row of every group, group after group.
    """
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


def expected_dense(groups: Sequence[StoredGroup], n_features: int) -> np.ndarray:
    """Every row in output columns, straight from the matrices.

    Returns
    -------
    ndarray
        float64, (n_rows of all groups, n_features). Values of a repeated column are added up.
    """
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
