"""Describe HDF5 datasets as ArrayLayouts: where their bytes lie, and which filters they went through.

h5py is used once, when a store is opened. Afterwards, chunks are read from the file and decoded as for any
other store, on many threads at once, which the HDF5 library does not allow.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np

from hbx_gpu._codecs.chain import LZF, V2_CHAIN
from hbx_gpu._h5ad.links import is_same_file
from hbx_gpu._remote.files import opened
from hbx_gpu._remote.places import is_remote
from hbx_gpu._source import ArrayLayout, ChunkTable, Configuration
from hbx_gpu._storage.plain import file_fingerprint, plain_layout
from hbx_gpu.errors import CorruptDataError, UnsupportedCodecError

if TYPE_CHECKING:
    import h5py

# Numbers that The HDF Group has registered for the filters that numcodecs decodes, and for LZF.
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_LZF, _BLOSC, _ZSTD = 32000, 32001, 32015
_COMPRESSORS = {_DEFLATE: "zlib", _LZF: LZF, _BLOSC: "blosc", _ZSTD: "zstd"}
_OTHERS = {
    4: "szip",
    5: "nbit",
    6: "scaleoffset",
    307: "bzip2",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32026: "blosc2",
}
_KNOWN = "gzip, lzf, shuffle, fletcher32, blosc and zstd"


def hdf5_layout(dataset: h5py.Dataset, path: str | os.PathLike[str], name: str) -> ArrayLayout:
    """Describe a dataset of numbers in an HDF5 file.

    Parameters
    ----------
    dataset
        The open dataset.
    path
        The file it lies in.
    name
        Path of the dataset inside its file, for messages.

    Returns
    -------
    ArrayLayout
        The layout. A contiguous dataset is described as a plain file, a chunked one with a table of its
        chunks. The file is watched: if it changes after this call, reading it is an error.

    Raises
    ------
    UnsupportedCodecError
        The dataset has a data type, storage or filter that cannot be read without the HDF5 library.
    CorruptDataError
        The file ends before the dataset does.
    """
    path = os.fspath(path) if is_remote(path) else os.path.abspath(path)
    if not is_same_file(dataset.file.filename, path):
        _refuse(path, name, f"is a link to the file {dataset.file.filename}")
    stored = dataset.dtype
    if stored.kind not in "iufb" or stored.itemsize > 8 or dataset.ndim == 0:
        raise UnsupportedCodecError(
            f"dataset {name!r} of {path} holds {stored} in shape {dataset.shape}; arrays of numbers up to "
            "8 bytes wide can be read in place. Ingest the file instead"
        )
    if dataset.is_virtual or dataset.external:
        kind = "a virtual dataset" if dataset.is_virtual else "stored in other files"
        _refuse(path, name, f"is {kind}")
    if dataset.chunks is None:
        return _contiguous(dataset, path, name)
    shape, chunks = tuple(map(int, dataset.shape)), tuple(map(int, dataset.chunks))
    return ArrayLayout(
        path=path,
        name=name,
        shape=shape,
        dtype=stored.newbyteorder("="),
        chunk_shape=chunks,
        shard_shape=chunks,
        codecs=({"name": V2_CHAIN, "configuration": _chain(dataset, path, name)},),
        fill_value=dataset.fillvalue,
        fingerprint=file_fingerprint(path, content=True),
        table=_table(dataset, path, name),
        watched=True,
    )


def _contiguous(dataset: h5py.Dataset, path: str, name: str) -> ArrayLayout:
    n = int(dataset.size)
    begin = dataset.id.get_offset()  # counted from the start of the file, in every release of HDF5
    if begin is None and n:
        if dataset.id.get_create_plist().get_layout() == 0:
            _refuse(path, name, "lies inside its header ('compact' storage)")
        raise CorruptDataError(
            f"dataset {name!r} of {path}: no element of its shape {dataset.shape} was ever written; "
            "was the program that wrote the file interrupted?"
        )
    if dataset.ndim == 1:
        return plain_layout(path, dataset.dtype, n, name=name, byte_offset=begin or 0, watched=True)
    # One chunk per row, at the place where the row begins.
    rows, stored = int(dataset.shape[0]), dataset.dtype
    row = n // rows * stored.itemsize if rows else 0
    plain_layout(path, stored, n, name=name, byte_offset=begin or 0)  # the file is long enough
    chunks = (1, *(max(1, int(n)) for n in dataset.shape[1:]))
    chain = {"dtype": stored.str, "order": "C", "filters": None, "compressor": None}
    return ArrayLayout(
        path=path,
        name=name,
        shape=tuple(map(int, dataset.shape)),
        dtype=stored.newbyteorder("="),
        chunk_shape=chunks,
        shard_shape=chunks,
        codecs=({"name": V2_CHAIN, "configuration": chain},),
        absent_is_fill=False,
        fingerprint=file_fingerprint(path, content=True),
        table=ChunkTable((begin or 0) + np.arange(rows, dtype=np.int64) * row, np.full(rows, row, np.int64)),
        watched=True,
    )


def _chain(dataset: h5py.Dataset, path: str, name: str) -> Configuration:
    """Return the filter pipeline as a zarr v2 chain; if the last filter compresses, it is the compressor."""
    pipeline = dataset.id.get_create_plist()
    filters: list[Configuration] = []
    for position in range(pipeline.get_nfilters()):
        code = pipeline.get_filter(position)[0]
        if code == _SHUFFLE:
            filters.append({"id": "shuffle", "elementsize": dataset.dtype.itemsize})
        elif code == _FLETCHER32:
            filters.append({"id": "fletcher32"})
        elif code in _COMPRESSORS:
            filters.append({"id": _COMPRESSORS[code]})
        else:
            _refuse(path, name, f"is stored with the filter {_OTHERS.get(code, 'of number')} ({code})")
    compressor = filters.pop() if filters and filters[-1]["id"] in _COMPRESSORS.values() else None
    return {"dtype": dataset.dtype.str, "order": "C", "filters": filters or None, "compressor": compressor}


class _StoredChunk(Protocol):
    """h5py's ``StoreInfo``."""

    chunk_offset: tuple[int, ...]
    filter_mask: int
    byte_offset: int
    size: int


def _table(dataset: h5py.Dataset, path: str, name: str) -> ChunkTable:
    chunks = np.array(dataset.chunks, np.int64)
    grid = -(-np.array(dataset.shape, np.int64) // chunks)
    n = int(grid.prod())
    strides = np.append(np.cumprod(grid[:0:-1])[::-1], 1)
    offset, nbytes = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    skipped = np.zeros(n, np.uint32)

    def enter(stored: _StoredChunk) -> None:
        number = int((np.array(stored.chunk_offset, np.int64) // chunks * strides).sum())
        offset[number], nbytes[number] = stored.byte_offset, stored.size
        skipped[number] = stored.filter_mask

    try:
        if n:
            dataset.id.chunk_iter(enter)
    except (RuntimeError, OSError, IndexError) as error:
        raise CorruptDataError(
            f"dataset {name!r} of {path}: its list of chunks cannot be read: {error}; the file is damaged"
        ) from error
    offset += _block_before(dataset, path, offset, nbytes)
    return ChunkTable(offset, nbytes, skipped if skipped.any() else None)


def _block_before(dataset: h5py.Dataset, path: str, offset: np.ndarray, nbytes: np.ndarray) -> int:
    """Return what must be added to the offsets of chunks in a file that begins with a user block.

    HDF5 before 1.14 counts offsets from the end of that block, later releases from the start of the file. One
    chunk is read in both ways to find out which of them applies.
    """
    block = dataset.file.userblock_size
    written = np.flatnonzero(nbytes > 0)
    if not block or not len(written):
        return 0
    number = int(written[0])
    where = np.unravel_index(number, tuple(-(-np.array(dataset.shape) // np.array(dataset.chunks))))
    corner = tuple(int(w) * c for w, c in zip(where, dataset.chunks, strict=True))
    _, content = dataset.id.read_direct_chunk(corner)
    with opened(path) as file:
        for begin in (0, block):
            file.seek(int(offset[number]) + begin)
            if file.read(len(content)) == bytes(content):
                return int(begin)
    raise CorruptDataError(f"{path}: its chunks do not lie where its user block of {block} bytes lets expect")


def _refuse(path: str, name: str, what: str) -> NoReturn:
    raise UnsupportedCodecError(
        f"dataset {name!r} of {path} {what}; contiguous datasets, and chunked ones with {_KNOWN}, can be "
        "read in place. Rewrite it, or ingest the file"
    )
