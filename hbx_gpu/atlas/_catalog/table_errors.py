"""LanceDB tables whose failures become errors of ours, which name the atlas, the table and what to do.

LanceDB raises RuntimeError, OSError, ValueError, errors of Arrow, and, where Rust panics, a class that does
not derive from `Exception`. All calls pass through to the table; only errors change.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, cast

from hbx_gpu._remote.options import options_of
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu.errors import HbxError, TableError

if TYPE_CHECKING:
    import lancedb
    from lancedb.table import Table

_OWN_STEPS = (KeyboardInterrupt, SystemExit, GeneratorExit, HbxError)
_PLACE_IN_RUST = re.compile(r",? ?(at )?/?\S+\.rs:\d+(:\d+)?")
_SHOWN = 400


@contextlib.contextmanager
def lance_errors(root: AnyPath, table: str) -> Iterator[None]:
    """Turn any error of LanceDB into a TableError.

    Raises
    ------
    TableError
        LanceDB failed; the message names the atlas and the table.
    """
    try:
        yield
    except _OWN_STEPS:
        raise
    except BaseException as error:  # a Rust panic does not derive from Exception
        text = _PLACE_IN_RUST.sub("", str(error)).strip() or type(error).__name__
        if isinstance(root, Place):  # its text may hold headers or signed addresses
            text = type(error).__name__
        text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise TableError(
            f"table {table!r} of the atlas at {root} cannot be used: {text}. Its files below "
            f"{root / 'lance_db'} are damaged or incomplete, or another program changed them just now: try "
            "again, open an earlier snapshot (RaggedAtlas.list_versions), or copy the atlas again from its "
            "origin"
        ) from error


def connect(root: AnyPath) -> lancedb.DBConnection:
    """The database of the atlas at `root`, with the storage options of its address."""
    import lancedb

    # LanceDB knows the keys of obstore: both configure the same library.
    options = options_of(root.url) if isinstance(root, Place) else None
    return lancedb.connect(str(root / "lance_db"), storage_options=options)


def open_guarded(root: AnyPath, name: str) -> Table:
    """The newest state of a table that exists.

    Raises
    ------
    TableError
        The table cannot be opened.
    """
    with lance_errors(root, name):
        opened = connect(root).open_table(name)
    return guarded(opened, root, name)


def guarded(table: Table, root: AnyPath, name: str) -> Table:
    """Wrap a table so that its errors become ours."""
    return cast("Table", _Guarded(table, root, name))


class _Guarded:
    """A LanceDB table, or an intermediate object that its methods return."""

    def __init__(self, inner: object, root: AnyPath, table: str) -> None:
        self._inner, self._root, self._table = inner, root, table

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        with lance_errors(self._root, self._table):
            found = getattr(self._inner, name)
        return self._passed(found)

    def __len__(self) -> int:
        with lance_errors(self._root, self._table):
            assert isinstance(self._inner, Sized)
            return len(self._inner)

    def _passed(self, found: object) -> object:
        if type(found).__module__.partition(".")[0] == "lancedb":
            return _Guarded(found, self._root, self._table)
        if isinstance(found, Iterator):
            return self._each(found)
        return self._called(found) if callable(found) else found

    def _called(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            with lance_errors(self._root, self._table):
                result = method(*args, **kwargs)
            return self._passed(result)

        return call

    def _each(self, items: Iterator[object]) -> Iterator[object]:
        while True:
            with lance_errors(self._root, self._table):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
