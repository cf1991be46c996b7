"""One view of zarr and HDF5 stores: groups with attributes, arrays as layouts, tables as data frames.

Large arrays are only described here; the loader's own readers fetch them. Small ones and tables are read
through h5py, zarr-python and anndata, which know every encoding that was ever written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import h5py
import numpy as np

from hbx_gpu._h5ad.foreign import describe_path
from hbx_gpu._h5ad.links import check_inside
from hbx_gpu._remote.files import RemoteFile
from hbx_gpu._remote.places import AnyPath, Place, is_remote, parse
from hbx_gpu._remote.stores import head, store_below
from hbx_gpu._remote.stores import names as list_names
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.hdf5 import hdf5_layout
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu._untrusted import Within, check_tree, found_at, parse_json, read_small
from hbx_gpu.errors import CorruptDataError, HbxError, InvalidDataError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd
    import zarr

_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
Document = Mapping[str, object]
MAX_ROWS = 1 << 31
"""Largest number of elements of an array that is read whole: a column of a table, row pointers."""


class Tree(Protocol):
    """An open store. Keys are paths inside it, their parts joined by slashes; "" is the root."""

    @property
    def path(self) -> AnyPath:
        """File or directory of the store, or its address."""
        ...

    def again(self) -> AbstractContextManager[Tree]:
        """Open the same store once more, in the same way."""
        ...

    def names(self, key: str = "") -> list[str]:
        """Names inside a group, sorted; empty if the group does not exist."""
        ...

    def is_array(self, key: str) -> bool:
        """Whether an array lies there."""
        ...

    def attributes(self, key: str = "") -> Mapping[str, object]:
        """Attributes of a group or an array."""
        ...

    def layout(self, key: str) -> ArrayLayout:
        """Where and how an array is stored."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array."""
        ...

    def array(self, key: str) -> np.ndarray:
        """A small array, read whole; text as Python strings."""
        ...

    def frame(self, key: str) -> pd.DataFrame:
        """A table, its index as strings."""
        ...

    def n_rows(self, key: str) -> int | None:
        """Number of rows of a table, from metadata alone; None where these do not tell."""
        ...


@contextlib.contextmanager
def open_tree(path: str | os.PathLike[str], *, allow_links: bool = False) -> Iterator[Tree]:
    """Open the store at `path`: a directory is zarr, a file is HDF5.

    Parameters
    ----------
    path
        The store; it may be reached through links itself.
    allow_links
        Follow links that lead out of the store: symbolic links of a zarr store; external links, external
        storage and virtual datasets of an HDF5 file.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    InvalidDataError
        Neither zarr nor HDF5, or cut short.
    """
    path = parse(path) if is_remote(path) else Path(path)
    if isinstance(path, Place):
        # An object of that name is an HDF5 file; a zarr store has objects below it.
        if head(path) is None:
            yield open_remote_zarr(path)
        else:
            with _open_remote_hdf5(path) as file:
                yield HdfTree(path, file, allow_links=allow_links)
        return
    if path.is_dir():
        if not _is_node(path):
            raise InvalidDataError(f"{path} is not a zarr store: there is neither zarr.json nor .zgroup")
        zarr = ZarrTree(path, allow_links=allow_links)
        zarr.attributes()  # metadata that are damaged or of another format are an error from the start
        yield zarr
        return
    with _open_hdf5(path) as file:
        yield HdfTree(path, file, allow_links=allow_links)


def _open_remote_hdf5(path: Place) -> h5py.File:
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 - registers the filters that h5py itself lacks
    try:
        return h5py.File(RemoteFile(path), "r")
    except OSError as error:
        if isinstance(error, HbxError):
            raise
        raise InvalidDataError(f"{path} cannot be opened: {error}; it is cut short or damaged") from error


def _open_hdf5(path: Path) -> h5py.File:
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}: the path does not exist")
    if found := found_at(path):
        raise InvalidDataError(f"{path} cannot be opened: {found}")
    if not h5py.is_hdf5(path):
        why = describe_path(path) or "its first bytes are not the HDF5 signature"
        raise InvalidDataError(f"{path} is not an HDF5 file: {why}")
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 - registers the filters that h5py itself lacks
    try:
        return h5py.File(path, "r")
    except OSError as error:
        what = (
            "another program has it open for writing"
            if "lock" in str(error)
            else "it is cut short or damaged"
        )
        raise InvalidDataError(f"{path} cannot be opened: {error}; {what}") from error


Node: TypeAlias = "h5py.Group | h5py.Dataset | zarr.Group | zarr.Array[Any]"


@runtime_checkable
class _Records(Protocol):
    """An array of h5py or zarr."""

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, part: object, /) -> np.ndarray: ...


class Tables(ABC):
    """Reading tables, which is the same for both kinds of store."""

    path: AnyPath

    @abstractmethod
    def _node(self, key: str) -> Node: ...

    @abstractmethod
    def is_array(self, key: str) -> bool:
        """Whether an array lies there."""

    @abstractmethod
    def attributes(self, key: str = "") -> Mapping[str, object]:
        """Attributes of a group or an array."""

    @abstractmethod
    def array(self, key: str) -> np.ndarray:
        """A small array, read whole; text as Python strings."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of an array."""

    def frame(self, key: str) -> pd.DataFrame:
        """A table, its index as strings.

        Raises
        ------
        CorruptDataError
            It is missing or cannot be read.
        """
        from anndata.io import read_elem

        try:
            node = self._node(key)
            frame = self._records(node[:]) if isinstance(node, _Records) else read_elem(node)
        except HbxError:
            raise
        except Exception as error:  # anndata raises whatever it meets in a damaged store
            plugin = isinstance(error, OSError) and "plugin" in str(error)
            advice = "; install hdf5plugin, which reads the filter it is stored with" if plugin else ""
            raise CorruptDataError(
                f"table {key!r} of {self.path} cannot be read: {_said(error)}{advice}"
            ) from error
        frame.index = frame.index.astype(str)
        return frame

    def _array(self, key: str) -> np.ndarray:
        """A small array of zarr, read whole; text as Python strings."""
        try:
            node = self._node(key)
            if not isinstance(node, _Records):
                raise CorruptDataError(f"{key!r} of {self.path} is a group; an array is expected")
            return _texts(np.atleast_1d(node[()]))
        except HbxError:
            raise
        except Exception as error:  # zarr raises whatever it meets in a damaged store
            raise CorruptDataError(f"array {key!r} of {self.path} cannot be read: {_said(error)}") from error

    def n_rows(self, key: str) -> int | None:
        """Number of rows of a table, from metadata alone; None where these do not tell."""
        if self.is_array(key):
            return self.shape(key)[0]
        attributes = self.attributes(key)
        index = str(attributes.get("_index", "index"))
        for array in (f"{key}/{index}", f"{key}/{index}/values", f"{key}/{index}/codes"):
            if self.is_array(array):
                return self.shape(array)[0]
        if "_index" in attributes:
            raise CorruptDataError(
                f"{self.path}: table {key!r} says that {index!r} is its index, and lacks it"
            )
        return None

    def _records(self, records: np.ndarray) -> pd.DataFrame:
        """A table stored as one array of records, as anndata did before 0.7; categories lie in ``uns``."""
        import pandas as pd

        frame = pd.DataFrame({name: _texts(records[name]) for name in records.dtype.names or ()})
        for column in frame.columns:
            labels = f"uns/{column}_categories"
            if frame[column].dtype.kind not in "iu" or not self.is_array(labels):
                continue
            names, codes = self.array(labels), frame[column].to_numpy()
            # Labels are stored by the name of the column alone, so those of obs and var overwrite each other:
            # codes without a label are those of the other table, and stay numbers.
            if len(codes) and -1 <= codes.min() and codes.max() < len(names):
                frame[column] = pd.Categorical.from_codes(codes, names)
        return frame.set_index("index" if "index" in frame.columns else frame.columns[0])


class HdfTree(Tables):
    """An open HDF5 file."""

    def __init__(self, path: AnyPath, file: h5py.File, *, allow_links: bool = False) -> None:
        self.path, self._file, self._allow_links = path, file, allow_links

    def again(self) -> AbstractContextManager[Tree]:
        return open_tree(self.path, allow_links=self._allow_links)

    def names(self, key: str = "") -> list[str]:
        node = self._at(key)
        return sorted(node) if isinstance(node, h5py.Group) else []

    def is_array(self, key: str) -> bool:
        return isinstance(self._at(key), h5py.Dataset)

    def attributes(self, key: str = "") -> dict[str, object]:
        with self._damage(f"attributes of {key!r}"):
            return {name: _plain(value) for name, value in self._found(key).attrs.items()}

    def shape(self, key: str) -> tuple[int, ...]:
        node = self._found(key)
        if not isinstance(node, h5py.Dataset):
            raise CorruptDataError(f"{key!r} of {self.path} is a group, an array is expected")
        return tuple(map(int, node.shape))

    def layout(self, key: str) -> ArrayLayout:
        with self._damage(f"array {key!r}"):
            return hdf5_layout(self._found(key), self.path, f"{self.path.name}/{key}")

    def array(self, key: str) -> np.ndarray:
        with self._damage(f"array {key!r}"):
            node = self._found(key)
            if not isinstance(node, h5py.Dataset):
                raise CorruptDataError(f"{key!r} of {self.path} is a group, an array is expected")
            check_rows(node.shape, f"array {key!r} of {self.path}")
            return _texts(np.atleast_1d(node[()]))

    def _node(self, key: str) -> Node:
        node = self._found(key)
        if not self._allow_links:
            check_inside(node, self.path)
        return node

    def _found(self, key: str) -> h5py.Group | h5py.Dataset:
        node = self._at(key)
        if node is None:
            raise CorruptDataError(f"{self.path} has no {key!r}, which other parts of it refer to")
        return node

    def _at(self, key: str) -> h5py.Group | h5py.Dataset | None:
        """The group or the dataset there, None without one."""
        with self._damage(f"node {key!r}"):
            node = self._file.get(key) if key else self._file
        if node is not None and not self._allow_links:
            check_inside(node, self.path, deep=False)
        return node

    @contextlib.contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Whatever h5py raises about damaged bytes, as one error."""
        try:
            yield
        except HbxError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
            raise CorruptDataError(f"{what} of {self.path} cannot be read: {_said(error)}") from error


class ZarrTree(Tables):
    """A zarr group on disk, of format 2 or 3.

    Its metadata are read one node at a time: what is damaged elsewhere in a store, or uses an extension, does
    not matter until it is needed.
    """

    def __init__(self, path: Path, *, allow_links: bool = False) -> None:
        self.path: Path = path
        self._allow_links = allow_links
        self._within = Within("" if allow_links else str(path))

    def again(self) -> AbstractContextManager[Tree]:
        return contextlib.nullcontext(self)

    def names(self, key: str = "") -> list[str]:
        folder = self.path / key
        if not folder.is_dir() or self.is_array(key):
            return []
        return sorted(child.name for child in folder.iterdir() if child.is_dir() and _is_node(child))

    def is_array(self, key: str) -> bool:
        folder = self.path / key
        if (folder / ".zarray").exists():
            return True
        document = folder / "zarr.json"
        return document.exists() and self._document(document).get("node_type") == "array"

    def attributes(self, key: str = "") -> Mapping[str, object]:
        folder = self.path / key
        if (folder / "zarr.json").exists():
            found = self._document(folder / "zarr.json").get("attributes", {})
        else:
            found = self._document(folder / ".zattrs") if (folder / ".zattrs").exists() else {}
        return found if isinstance(found, dict) else {}

    def shape(self, key: str) -> tuple[int, ...]:
        folder = self.path / key
        document = folder / "zarr.json" if (folder / "zarr.json").exists() else folder / ".zarray"
        return shape_of(self._document(document), document)

    def layout(self, key: str) -> ArrayLayout:
        within = "" if self._allow_links else self.path
        return read_layout(str(self.path / key), f"{self.path.name}/{key}", within=within)

    def array(self, key: str) -> np.ndarray:
        return self._array(key)

    def _node(self, key: str) -> Node:
        import zarr

        folder = self.path / key
        if not _is_node(folder):
            raise KeyError(key)
        # zarr-python would wait for a FIFO, follow any link, and make room for any shape.
        check_tree(folder, links=self._allow_links, root=self.path)
        for document in itertools.chain(folder.rglob("zarr.json"), folder.rglob(".zarray")):
            found = self._document(document)
            is_array = document.name == ".zarray" or found.get("node_type") == "array"
            if is_array and found.get("shape") != []:  # a number alone has no axis
                check_rows(shape_of(found, document), str(document))
        return zarr.open(str(folder), mode="r")

    def _document(self, path: Path) -> dict[str, object]:
        self._within.check(str(path))
        found = parse_json(read_small(path), path)
        if not isinstance(found, dict):
            raise CorruptDataError(f"the zarr metadata {path} hold a {type(found).__name__}, not an object")
        if path.name == "zarr.json" and found.get("zarr_format") != 3:
            raise InvalidDataError(
                f"{path} says zarr_format {found.get('zarr_format')!r}; zarr formats 2 and 3 can be opened"
            )
        return found


class RemoteZarrTree(Tables):
    """A zarr group in object storage, of format 2 or 3.

    Consolidated metadata, where a store has them, name all nodes at once; otherwise every node takes requests
    and names are listed, which plain HTTP servers cannot do.

    Raises
    ------
    InvalidDataError
        There is no zarr group.
    """

    def __init__(self, path: Place) -> None:
        self.path: Place = path
        self._documents: dict[str, Document | None] = {}
        self._whole = False
        root = self._document("zarr.json")
        if root is not None:
            self._take(root.get("consolidated_metadata"), "{}/zarr.json")
        elif (old := self._document(".zmetadata")) is not None:
            self._take(old, "{}")
        elif self._document(".zgroup") is None:
            raise InvalidDataError(f"{path} is not a zarr store: there is neither zarr.json nor .zgroup")
        if root is not None and root.get("zarr_format") != 3:
            raise InvalidDataError(
                f"{path} says zarr_format {root.get('zarr_format')!r}; zarr formats 2 and 3 can be opened"
            )

    def _take(self, consolidated: object, name: str) -> None:
        found = consolidated.get("metadata") if isinstance(consolidated, dict) else None
        if not isinstance(found, dict):
            return
        for key, document in found.items():
            if isinstance(document, dict):
                self._documents[name.format(key).lstrip("/")] = document
        self._whole = True

    def _document(self, key: str) -> Document | None:
        """A document by its path in the store, None if there is none."""
        if key in self._documents or (self._whole and key.rpartition("/")[2] in _FILES):
            return self._documents.get(key)
        place = self.path / key
        try:
            found = parse_json(read_small(place), place)
        except FileNotFoundError:
            found = None
        if found is not None and not isinstance(found, dict):
            raise CorruptDataError(f"the zarr metadata {place} hold a {type(found).__name__}, not an object")
        self._documents[key] = found
        return found

    def again(self) -> AbstractContextManager[Tree]:
        return contextlib.nullcontext(self)

    def names(self, key: str = "") -> list[str]:
        if self.is_array(key):
            return []
        if not self._whole:
            return list_names(self.path / key)[1]
        prefix = f"{key}/" if key else ""
        below = (name.removeprefix(prefix) for name in self._documents if name.startswith(prefix))
        return sorted({name.split("/")[0] for name in below if "/" in name})

    def is_array(self, key: str) -> bool:
        prefix = f"{key}/" if key else ""
        document = self._document(f"{prefix}zarr.json")
        if document is not None:
            return document.get("node_type") == "array"
        return self._document(f"{prefix}.zarray") is not None

    def attributes(self, key: str = "") -> Mapping[str, object]:
        prefix = f"{key}/" if key else ""
        document = self._document(f"{prefix}zarr.json")
        found = (self._document(f"{prefix}.zattrs") or {}) if document is None else document.get("attributes")
        return found if isinstance(found, Mapping) else {}

    def shape(self, key: str) -> tuple[int, ...]:
        document = self._document(f"{key}/zarr.json") or self._document(f"{key}/.zarray") or {}
        return shape_of(document, str(self.path / key))

    def layout(self, key: str) -> ArrayLayout:
        return read_layout(self.path / key, f"{self.path.name}/{key}")

    def array(self, key: str) -> np.ndarray:
        return self._array(key)

    def _node(self, key: str) -> Node:
        import zarr
        from zarr.storage import ObjectStore

        self._check_sizes(key)
        # anndata goes up to the root of the store for the categories of old releases.
        store = ObjectStore(store_below(self.path), read_only=True)
        try:
            return zarr.open(store, path=key, mode="r")
        except FileNotFoundError:
            raise KeyError(key) from None

    def _check_sizes(self, key: str) -> None:
        """Refuse what no table can hold, before room is made for it."""
        pending = [key]
        while pending:
            node = pending.pop()
            if self.is_array(node):
                document = self._document(f"{node}/zarr.json") or self._document(f"{node}/.zarray") or {}
                if document.get("shape") != []:
                    check_rows(self.shape(node), str(self.path / node))
            else:
                pending += [f"{node}/{name}" for name in self.names(node)]


def open_remote_zarr(path: Place) -> RemoteZarrTree:
    """The zarr group at an address.

    Raises
    ------
    InvalidDataError
        There is none.
    UnsupportedError
        It has no consolidated metadata and lies on a server that cannot list.
    """
    tree = RemoteZarrTree(path)
    if not tree._whole and not path.lists:
        raise UnsupportedError(
            f"{path} is a zarr store without consolidated metadata on a plain HTTP server, which cannot list "
            "what it holds: run zarr.consolidate_metadata on it, or open it by s3://, gs:// or az://"
        )
    return tree


def _is_node(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("zarr.json", ".zgroup", ".zarray"))


def shape_of(metadata: Mapping[str, object], document: object) -> tuple[int, ...]:
    shape = metadata.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n >= 0 for n in shape):
        raise CorruptDataError(f"the zarr metadata {document} have the shape {str(shape)[:100]}")
    return tuple(shape)


def check_rows(shape: tuple[int, ...], what: str) -> None:
    """Refuse what no table can hold, before room is made for it."""
    if math.prod(shape) > MAX_ROWS:
        raise CorruptDataError(
            f"{what} has the shape {list(shape)}; tables of up to {MAX_ROWS:,} rows are read. It is damaged: "
            "copy the store again from its origin"
        )


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _texts(values: np.ndarray) -> np.ndarray:
    """Bytes and NumPy strings as Python strings; numbers as they are."""
    if values.dtype.kind == "S" or (
        values.dtype.kind == "O" and len(values) and isinstance(values[0], bytes)
    ):
        texts = np.empty(len(values), object)
        texts[:] = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values.tolist()]
        return texts
    return values.astype(object) if values.dtype.kind in "UT" else values


def _plain(value: object) -> object:
    """An HDF5 attribute as a Python value: fixed-length strings are text as well."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray) and value.dtype.kind in "SO":
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value.tolist()]
    return value
