"""Read zarr metadata on disk as ArrayLayouts, by plain JSON parsing: thousands of groups open quickly."""

from __future__ import annotations

import hashlib
import math
import operator
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn, NotRequired, TypedDict

import numpy as np

from hbx_gpu._codecs.chain import V2_CHAIN
from hbx_gpu._remote.places import is_remote, parse
from hbx_gpu._source import ArrayLayout, Codec, Configuration, Scalar
from hbx_gpu._storage.plain import file_fingerprint
from hbx_gpu._untrusted import Within, parse_json
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedCodecError

_DTYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_DTYPES |= {"float16", "float32", "float64"}
_FLOAT_BITS = {4: ">e", 8: ">f", 16: ">d"}
MAX_CHUNK_BYTES = (1 << 31) - 1
"""Most bytes of a decoded chunk: the limit of blosc, and of kernels, which count in 31 bits."""
_MAX_AXES = 32
_MAX_BYTES = 1 << 60
_MAX_CHUNKS = 1 << 30
_MAX_CHUNKS_PER_SHARD = 1 << 26  # the index of such a shard takes a gigabyte
# Keys of an array in zarr v3, and what zarr-python adds. Whoever does not know another key may
# read the array only if the key says so ("must_understand": false).
_KEYS = {"zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value"}
_KEYS |= {"codecs", "attributes", "dimension_names", "storage_transformers", "consolidated_metadata"}
_DOCUMENT = "zarr.json"
_NAMED_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def read_layout(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    absent_is_fill: bool = True,
    within: str | os.PathLike[str] | Within = "",
    document: bytes | None = None,
) -> ArrayLayout:
    """Read where and how a zarr array (v3 or v2) is stored.

    Parameters
    ----------
    path
        Directory of the array, holding ``zarr.json`` or ``.zarray``.
    name
        Path of the array inside its store, for messages; by default the directory's name.
    absent_is_fill
        Whether a missing object means that its elements are the fill value (zarr's rule); otherwise it is an
        error.
    within
        Folder that links must not lead out of, as in `ArrayLayout`; empty where they may lead anywhere. A
        `Within` remembers the folders it has looked at, for many arrays.
    document
        The content of ``zarr.json`` where the caller knows it, which is then not read.

    Returns
    -------
    ArrayLayout
        The layout, with an absolute path. `hbx_gpu._codecs.chain` describes the codecs of v2 arrays.

    Raises
    ------
    FileNotFoundError
        There are no array metadata at `path`; the message lists what is there.
    CorruptDataError
        The metadata are not JSON, describe a group, contradict themselves, or describe an array larger than
        any disk. `UnsafePathError`: the document is not a regular file, or lies outside of `within`.
    UnsupportedCodecError
        A data type, chunk grid, storage transformer or place of the sharding codec is not supported.
    """
    directory = str(parse(path)) if is_remote(path) else os.path.abspath(path)
    name = os.path.basename(directory) if name is None else name
    guard = within if isinstance(within, Within) else Within(os.fspath(within))
    found = _load(directory, guard) if document is None else (f"{directory}/{_DOCUMENT}", document)
    if found is None:
        raise FileNotFoundError(_nothing_there(directory, name))
    path, text = found
    fingerprint = _fingerprint(text)
    known = None if path.endswith(".zarray") else _like_another(text)
    like = None if known is None else _like.get(known[0])
    # No larger than one that was checked: it is not checked again.
    if known is not None and like is not None and all(map(operator.le, known[1], like.shape)):
        return like.elsewhere(directory, name, known[1], absent_is_fill, fingerprint, guard.root)
    metadata = _Metadata(_parse(path, text), path, name, fingerprint)
    read = metadata.v2 if path.endswith(".zarray") else metadata.v3
    layout = replace(read(directory, absent_is_fill), within=guard.root)
    metadata.check_extent(layout)
    if known is not None:
        if len(_like) >= _MOST_LIKE:
            _like.clear()
        _like[known[0]] = layout
    return layout


# Documents of an atlas mostly differ in the shape alone. What comes before and after it -> the layout of the
# largest array that was read from such a document.
_like: dict[tuple[bytes, bytes, int], ArrayLayout] = {}
_MOST_LIKE = 64
_SHAPE = re.compile(rb'"shape"[ \t\r\n]*:[ \t\r\n]*\[([ \t\r\n,0-9]+)\]')
_SIZE = re.compile(rb"[1-9][0-9]{0,17}")


def _like_another(text: bytes) -> tuple[tuple[bytes, bytes, int], tuple[int, ...]] | None:
    """The document of a v3 array without its shape, and the shape; None where that is not certain."""
    found = _SHAPE.search(text)
    # With an escape, a key may be spelled in several ways. An axis without elements has chunks of its own.
    if found is None or text.count(b'"shape"') != 1 or b"\\" in text:
        return None
    sizes = [size.strip() for size in found[1].split(b",")]
    if len(sizes) > _MAX_AXES or not all(map(_SIZE.fullmatch, sizes)):
        return None
    key = text[: found.start(1)], text[found.end(1) :], len(sizes)
    return key, tuple(map(int, sizes))


def is_current(layout: ArrayLayout, within: Within | None = None) -> bool:
    """Return whether the metadata of an array, or its plain file, are still what `layout` was made from.

    `within` refuses links that lead out, where many arrays of one folder are looked at.
    """
    if not layout.fingerprint:
        return True
    if layout.byte_offset is not None or layout.table is not None:
        return file_fingerprint(layout.path, content=layout.watched) == layout.fingerprint
    found = _load(layout.path, within or Within(layout.within))
    if found is not None and _fingerprint(found[1]) == layout.fingerprint:
        return True
    _changed.add(layout.path)
    return False


_changed: set[str] = set()  # arrays whose metadata this process found to be others than those it had read


def found_changed(folder: str) -> bool:
    """Whether this process has found that metadata of arrays below a folder had changed.

    What is kept elsewhere about these arrays may then be out of date.
    """
    return any(path.startswith(f"{folder}/") for path in list(_changed))


def read_document(path: str | os.PathLike[str], within: Within) -> bytes | None:
    """The ``zarr.json`` of an array; None where it has none. Raises as :func:`read_layout`."""
    found = _load(os.fspath(path), within)
    return found[1] if found is not None and found[0].endswith(_DOCUMENT) else None


def object_path(layout: ArrayLayout, where: Sequence[int]) -> str:
    """Return the path of the stored object at these grid coordinates, or of the plain file."""
    if layout.byte_offset is not None or layout.table is not None:
        return layout.path
    key = layout.key_prefix + layout.key_separator.join(map(str, where))
    return f"{layout.path}/{key}"


def check_last_object(layout: ArrayLayout) -> None:
    """Check that the last object of an array exists, for an array that must have all of its objects.

    A shape that is too large in the metadata is found this way, before rows are read.

    Raises
    ------
    CorruptChunkError
        The object is missing.
    """
    # In object storage this would take a request for every array; its first read finds a missing object.
    if layout.absent_is_fill or not all(layout.shape) or is_remote(layout.path):
        return
    last = [(n - 1) // shard for n, shard in zip(layout.shape, layout.shard_shape, strict=True)]
    path = object_path(layout, last)
    try:
        os.lstat(path)
    except OSError:
        raise CorruptChunkError(
            f"the object is missing, the last one of shape {list(layout.shape)}: the metadata are damaged, "
            "or it was not copied; restore it",
            file=path,
            array=layout.name,
        ) from None


def _load(directory: str, within: Within) -> tuple[str, bytes] | None:
    """Return path and content of the metadata document, or None if there is none."""
    for name in (_DOCUMENT, ".zarray"):
        path = f"{directory}/{name}"
        try:
            return path, within.read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


def _fingerprint(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _parse(path: str, text: bytes) -> dict[str, object]:
    found = parse_json(text, f"zarr metadata {path}")
    if not isinstance(found, dict):
        raise CorruptDataError(f"zarr metadata {path} hold a {type(found).__name__}, an object is expected")
    return found


def _nothing_there(directory: str, name: str) -> str:
    if is_remote(directory):
        there = "no object of these names is there"
    elif not os.path.isdir(directory):
        there = "that path is a file" if os.path.exists(directory) else "that directory does not exist"
    else:
        entries = sorted(os.listdir(directory))
        there = f"the directory holds {', '.join(entries[:8]) or 'nothing'}{' ...' if entries[8:] else ''}"
    return f"no zarr array {name!r} at {directory}: neither zarr.json nor .zarray; {there}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def _scalar(dtype: np.dtype, value: float) -> Scalar:
    scalar: Scalar = dtype.type(value)
    return scalar


class _Chain(TypedDict):
    """The arguments of a layout that the codecs of an array decide."""

    chunk_shape: tuple[int, ...]
    codecs: tuple[Codec, ...]
    sharded: NotRequired[bool]
    index_at_end: NotRequired[bool]
    index_codecs: NotRequired[tuple[Codec, ...]]


class _Metadata:
    """One metadata document; every error about it names its file."""

    def __init__(self, document: dict[str, object], file: str, name: str, fingerprint: str) -> None:
        self._document, self._file, self._name = document, file, name
        self._fingerprint = fingerprint

    def v3(self, directory: str, absent_is_fill: bool) -> ArrayLayout:
        if self._get("zarr_format") != 3:
            self._corrupt(f"zarr_format is {self._get('zarr_format')!r}, 3 is expected")
        if self._get("node_type") != "array":
            self._corrupt(f"node_type is {self._get('node_type')!r}, an array is expected")
        if self._document.get("storage_transformers"):
            self._unsupported(f"storage_transformers {self._document['storage_transformers']}")
        for key in self._document.keys() - _KEYS:
            extension = self._document[key]
            if not isinstance(extension, dict) or extension.get("must_understand") is not False:
                self._unsupported(f"the extension {key!r}, which is not known here")
        shape = self._integers("shape", self._get("shape"), least=0)
        grid, setting = self._named("chunk_grid", self._get("chunk_grid"))
        if grid != "regular":
            self._unsupported(f"chunk grid {grid!r} (regular is read)")
        outer = self._chunk_shape("chunk_shape", setting.get("chunk_shape"), shape)
        dtype_name = self._get("data_type")
        if isinstance(dtype_name, dict) and not dtype_name.get("configuration"):
            dtype_name = dtype_name.get("name")
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            self._unsupported(f"data_type {dtype_name!r} ({', '.join(sorted(_DTYPES))} are read)")
        dtype = np.dtype(dtype_name)
        prefix, separator = self._chunk_keys(len(shape))
        return ArrayLayout(
            path=directory,
            name=self._name,
            shape=shape,
            dtype=dtype,
            shard_shape=outer,
            fill_value=self._fill_value(dtype, self._get("fill_value")),
            key_prefix=prefix,
            key_separator=separator,
            absent_is_fill=absent_is_fill,
            fingerprint=self._fingerprint,
            **self._codecs(outer, shape),
        )

    def check_extent(self, layout: ArrayLayout) -> None:
        """Raise an error for sizes that no store can hold, before anything is allocated for them."""
        nbytes = math.prod(layout.shape) * layout.dtype.itemsize
        if nbytes > _MAX_BYTES:
            self._corrupt(f"shape {list(layout.shape)} of {layout.dtype} takes {nbytes:,} bytes")
        chunk_bytes = math.prod(layout.chunk_shape) * layout.dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            self._unsupported(
                f"chunks of {chunk_bytes:,} bytes (shape {list(layout.chunk_shape)}); chunks of up to "
                f"{MAX_CHUNK_BYTES:,} bytes are read"
            )
        grid = math.prod(-(-n // chunk) for n, chunk in zip(layout.shape, layout.chunk_shape, strict=True))
        inner = math.prod(
            shard // chunk for shard, chunk in zip(layout.shard_shape, layout.chunk_shape, strict=True)
        )
        if grid > _MAX_CHUNKS or inner > _MAX_CHUNKS_PER_SHARD:
            self._unsupported(
                f"{grid:,} chunks, {inner:,} of them per stored object; up to {_MAX_CHUNKS:,} and "
                f"{_MAX_CHUNKS_PER_SHARD:,} are read"
            )

    def v2(self, directory: str, absent_is_fill: bool) -> ArrayLayout:
        if self._get("zarr_format") != 2:
            self._corrupt(f"zarr_format is {self._get('zarr_format')!r}, 2 is expected")
        shape = self._integers("shape", self._get("shape"), least=0)
        chunks = self._chunk_shape("chunks", self._get("chunks"), shape)
        stored_dtype = self._v2_dtype(self._get("dtype"))
        dtype = stored_dtype.newbyteorder("=")
        separator = self._separator(self._document.get("dimension_separator", "."))
        order = self._get("order")
        if order not in ("C", "F"):
            self._corrupt(f"order is {order!r}, C or F is expected")
        filters, compressor = self._document.get("filters"), self._document.get("compressor")
        if filters is not None and not isinstance(filters, list):
            self._corrupt(f"filters are {_short(filters)}, a list or null is expected")
        for codec in [*(filters or []), *([compressor] if compressor else [])]:
            if not isinstance(codec, dict) or not isinstance(codec.get("id"), str):
                self._corrupt(f"filter or compressor {codec!r} has no id")
        fill_value = self._document.get("fill_value")
        chain = {"dtype": stored_dtype.str, "order": order, "filters": filters, "compressor": compressor}
        return ArrayLayout(
            path=directory,
            name=self._name,
            shape=shape,
            dtype=dtype,
            chunk_shape=chunks,
            shard_shape=chunks,
            codecs=({"name": V2_CHAIN, "configuration": chain},),
            # A fill value of null leaves absent chunks undefined; zarr-python reads zeros then.
            fill_value=dtype.type(0) if fill_value is None else self._fill_value(dtype, fill_value),
            key_prefix="" if shape else "0",
            key_separator=separator,
            absent_is_fill=absent_is_fill,
            fingerprint=self._fingerprint,
        )

    def _codecs(self, outer: tuple[int, ...], shape: tuple[int, ...]) -> _Chain:
        chain = self._chain("codecs", self._get("codecs"))
        names = [codec["name"] for codec in chain]
        if "sharding_indexed" not in names:
            return {"chunk_shape": outer, "codecs": chain}
        if len(chain) > 1:
            self._unsupported(f"sharding_indexed among other codecs ({', '.join(names)})")
        setting = chain[0].get("configuration") or {}
        inner = self._chunk_shape("inner chunk_shape", setting.get("chunk_shape"), shape)
        if any(shard % chunk for shard, chunk in zip(outer, inner, strict=True)):
            self._corrupt(f"inner chunk_shape {inner} does not divide the shard shape {outer}")
        codecs = self._chain("inner codecs", setting.get("codecs"))
        if any(codec["name"] == "sharding_indexed" for codec in codecs):
            self._unsupported("sharding_indexed inside sharding_indexed")
        location = setting.get("index_location", "end")
        if location not in ("start", "end"):
            self._corrupt(f"index_location is {location!r}, start or end is expected")
        return {
            "chunk_shape": inner,
            "codecs": codecs,
            "sharded": True,
            "index_at_end": location == "end",
            "index_codecs": self._chain("index_codecs", setting.get("index_codecs")),
        }

    def _chunk_keys(self, ndim: int) -> tuple[str, str]:
        encoding, setting = self._named("chunk_key_encoding", self._get("chunk_key_encoding"))
        if encoding == "default":
            separator = self._separator(setting.get("separator", "/"))
            return "c" + separator if ndim else "c", separator
        if encoding == "v2":
            return "" if ndim else "0", self._separator(setting.get("separator", "."))
        self._unsupported(f"chunk_key_encoding {encoding!r} (default and v2 are read)")

    def _separator(self, separator: object) -> str:
        if separator not in (".", "/"):
            self._corrupt(f"chunk key separator is {separator!r}, '.' or '/' is expected")
        return str(separator)

    def _chain(self, what: str, codecs: object) -> tuple[Codec, ...]:
        if not isinstance(codecs, list) or not codecs:
            self._corrupt(f"{what} is {codecs!r}, a list of codecs is expected")
        named = (self._named(what, codec) for codec in codecs)
        return tuple({"name": name, "configuration": setting} for name, setting in named)

    def _named(self, what: str, value: object) -> tuple[str, Configuration]:
        """Return name and configuration of an extension point, which may be given as a name alone."""
        if isinstance(value, str):
            return value, {}
        if isinstance(value, dict):
            name, setting = value.get("name"), value.get("configuration", {})
            if isinstance(name, str) and isinstance(setting, dict):
                return name, setting
        self._corrupt(f"{what} holds {value!r}, an object with name and configuration is expected")

    def _integers(self, what: str, value: object, *, least: int, ndim: int | None = None) -> tuple[int, ...]:
        if isinstance(value, list) and len(value) > _MAX_AXES:
            self._unsupported(f"{len(value)} axes in {what}; up to {_MAX_AXES} are read")
        if (
            not isinstance(value, list)
            or not all(type(n) is int and least <= n < 1 << 63 for n in value)
            or (ndim is not None and len(value) != ndim)
        ):
            length = "" if ndim is None else f"{ndim} "
            self._corrupt(f"{what} is {_short(value)}, {length}integers >= {least} are expected")
        return tuple(value)

    def _chunk_shape(self, what: str, value: object, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a chunk; some writers give an axis without elements chunks of length 0."""
        if isinstance(value, list) and len(value) == len(shape):
            value = [1 if (chunk, n) == (0, 0) else chunk for chunk, n in zip(value, shape, strict=True)]
        return self._integers(what, value, least=1, ndim=len(shape))

    def _v2_dtype(self, value: object) -> np.dtype:
        try:
            dtype = np.dtype(value) if isinstance(value, str) else None
        except TypeError:
            dtype = None
        if dtype is None or dtype.newbyteorder("=").name not in _DTYPES:
            self._unsupported(f"dtype {value!r} ({', '.join(sorted(_DTYPES))} are read)")
        return dtype

    def _fill_value(self, dtype: np.dtype, value: object) -> Scalar:
        """Return the fill value as a scalar of `dtype`."""
        if dtype.kind == "f" and isinstance(value, str):
            number = _NAMED_FLOATS.get(value)
            if number is None:
                number = self._float_of_bits(value)
            return _scalar(dtype, number)
        if dtype.kind == "b" and isinstance(value, bool):
            return _scalar(dtype, value)
        if dtype.kind == "f" and isinstance(value, int | float):
            return _scalar(dtype, value)
        if dtype.kind in "iu" and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        ):
            limits = np.iinfo(dtype)
            if limits.min <= value <= limits.max:
                return _scalar(dtype, value)
        self._corrupt(f"fill_value {value!r} is not a value of {dtype}")

    def _float_of_bits(self, text: str) -> float:
        try:
            digits = text.removeprefix("0x")
            return float(struct.unpack(_FLOAT_BITS[len(digits)], bytes.fromhex(digits))[0])
        except (KeyError, ValueError):
            self._corrupt(
                f"fill_value {text!r} is neither NaN, Infinity, -Infinity nor 0x and 4, 8 or 16 digits"
            )

    def _get(self, key: str) -> object:
        if key not in self._document:
            self._corrupt(f"key {key!r} is missing; it has {', '.join(sorted(self._document))}")
        return self._document[key]

    def _corrupt(self, what: str) -> NoReturn:
        raise CorruptDataError(f"metadata of array {self._name!r} ({self._file}): {what}")

    def _unsupported(self, what: str) -> NoReturn:
        raise UnsupportedCodecError(
            f"array {self._name!r} ({self._file}) uses {what}; rewrite the array to read it here"
        )
