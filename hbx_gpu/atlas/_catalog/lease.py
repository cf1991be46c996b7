"""The write lock where locks of the file system do not hold: a lease in a small Lance table.

The table has one row, the holder and the time until which it holds. Taking, prolonging and giving back are
updates of that row, and Lance lets only one of two updates of a row succeed, because it makes each version by
a step that is atomic on every file system. A holder that dies prolongs no longer, so its lease runs out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import lancedb
import pyarrow as pa
from lancedb.table import Table

from hbx_gpu.atlas._catalog.table_errors import lance_errors
from hbx_gpu.atlas._catalog.tables import quoted
from hbx_gpu.atlas._model.schema import make_uid
from hbx_gpu.errors import AtlasLockedError, TableError

_log = logging.getLogger(__name__)

SECONDS = 60.0
"""How long a lease holds; it is prolonged after a third of that."""
_SKEW = 30.0  # clocks of machines may differ by so much
_TABLE = "lease"
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("holder", pa.string(), nullable=False),
        pa.field("until", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class _Row:
    """Who holds the lease, and until when: seconds since 1970, 0 where it was given back."""

    token: str
    holder: str
    until: float


class Lease:
    """The lease of an atlas, taken when this is made.

    Parameters
    ----------
    root
        Directory of the atlas.
    folder
        Our own folder in it, which gets the table.

    Raises
    ------
    AtlasLockedError
        Somebody else holds it.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self._token = root, make_uid()
        self._lost = ""
        self._ended = threading.Event()
        with lance_errors(root, _TABLE):
            self._table = _opened(folder)
            self._take()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Raise if the lease ran out or is somebody else's.

        Raises
        ------
        AtlasLockedError
            It did.
        """
        if not self._lost and time.time() > self._until:
            self._lost = "it could not be prolonged in time"
        if self._lost:
            raise AtlasLockedError(
                f"this process lost the write lock of the atlas at {self._root}: {self._lost}. What it was "
                "adding was not added; run it again"
            )

    def release(self) -> None:
        """Let others write."""
        self._ended.set()
        self._keeper.join()
        with contextlib.suppress(Exception):  # it runs out in any case
            self._put(f"token = {quoted(self._token)}", until=0.0)
            # No snapshot refers to this table, and its old versions are of no use.
            self._table.optimize(cleanup_older_than=timedelta(seconds=SECONDS))

    def _take(self) -> None:
        now = time.time()
        row = self._row()
        if row.until + _SKEW > now and row.until > 0:
            raise AtlasLockedError(
                f"another writer holds the atlas at {self._root} ({row.holder}); wait until it has "
                f"finished and try again. If it was killed, its lease ends in {row.until + _SKEW - now:.0f} s"
            )
        # Succeeds for one of several that saw the same row: its token is another one afterward.
        with contextlib.suppress(Exception):  # the loser of two may get an error instead of no row
            self._put(f"token = {quoted(row.token)}", token=self._token, until=now + SECONDS)
        if (found := self._row()).token != self._token:
            raise AtlasLockedError(
                f"another writer took the atlas at {self._root} just now ({found.holder}); wait until it "
                "has finished and try again"
            )
        self._until = now + SECONDS

    def _keep(self) -> None:
        while not self._ended.wait(SECONDS / 3):
            until = time.time() + SECONDS
            try:
                self._put(f"token = {quoted(self._token)}", until=until)
                row = self._row()
            except Exception as error:
                _log.warning("the lease of the atlas at %s is not prolonged: %s", self._root, error)
                continue
            if row.token != self._token:
                self._lost = f"{row.holder} has it"
                return
            self._until = until

    def _put(self, where: str, *, until: float, token: str | None = None) -> None:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._table.checkout_latest()
        self._table.update(
            where=where, values={"token": token or self._token, "holder": holder, "until": until}
        )

    def _row(self) -> _Row:
        self._table.checkout_latest()
        rows = self._table.to_arrow().to_pylist()
        if len(rows) != 1:
            raise TableError(
                f"the table of the write lock in {self._root} has {len(rows)} rows, expected is one; remove "
                "its folder while nobody writes"
            )
        return _Row(str(rows[0]["token"]), str(rows[0]["holder"]), float(rows[0]["until"]))


def _opened(folder: Path) -> Table:
    """The table with its one row, made by whoever comes first."""
    database = lancedb.connect(str(folder))
    if not (folder / f"{_TABLE}.lance").is_dir():
        first = pa.table({"key": ["atlas"], "token": [""], "holder": [""], "until": [0.0]}, schema=_SCHEMA)
        with contextlib.suppress(Exception):  # somebody else made it just now
            return database.create_table(_TABLE, first)
    return database.open_table(_TABLE)
