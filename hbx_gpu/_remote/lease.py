"""The write lock of a place in object storage: an object that its holder renews, and others respect.

A store has no locks that it releases when a process dies. A lease ends by itself when it was not renewed for
a minute by the clock of the store, or at once if its holder is seen to have died on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import fail, store_of
from hbx_gpu._remote.writing import ConflictError, put, put_new, put_over, read_version, remove
from hbx_gpu.errors import AtlasLockedError, HbxError

SECONDS = 60.0
"""How long a lease lasts if it is not renewed."""
FOLDER = ".hbx_gpu"
"""Folder of a place with its lease and the notes of its writers."""
# Stores give times in whole seconds.
_SLACK = 2.0


class Lease:
    """The right to write below a place, for one process at a time.

    Parameters
    ----------
    place
        What is written.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._object = place / FOLDER / "lease.json"
        self._version = ""
        self._until = 0.0
        self._beat = 0
        self._lost = False
        self._done = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease.

        Raises
        ------
        AtlasLockedError
            Somebody else has it.
        RemoteError
            The store does not answer, or refuses.
        """
        self._token, self._beat, self._lost = uuid.uuid4().hex, 0, False
        self._done.clear()
        found, version = read_version(self._object)
        before = time.monotonic()
        try:
            if not version:
                self._version = put_new(self._object, self._text())
            else:
                self._check_free(found)
                self._version = put_over(self._object, self._text(), version)
        except ConflictError:
            raise AtlasLockedError(
                f"another writer has just begun to write to {self._place}; wait until it has finished and "
                "try again"
            ) from None
        self._until = before + SECONDS
        self._thread = threading.Thread(target=self._renew_often, name="hbx-gpu-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that nobody else can write.

        Raises
        ------
        AtlasLockedError
            The lease could not be renewed in time, so it may have passed to somebody else.
        """
        if self._lost or time.monotonic() > self._until - _SLACK:
            raise AtlasLockedError(
                f"the lease on {self._place} could not be renewed in time, so another writer may have it; "
                "nothing became visible, try again"
            )

    def renew(self) -> None:
        """Renew the lease.

        Raises
        ------
        AtlasLockedError
            It has passed to somebody else.
        RemoteError
            The store does not answer, or refuses.
        """
        with self._guard:
            before = time.monotonic()
            self._beat += 1
            try:
                self._version = put_over(self._object, self._text(), self._version)
            except ConflictError:
                self._lost = True
            else:
                self._until = before + SECONDS
        self.check()

    def release(self) -> None:
        """Give the lease back. It ends by itself if the store does not answer."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        # A lease that has passed to somebody else is an object of another version, which stays as it is.
        with contextlib.suppress(HbxError):
            put_over(self._object, json.dumps({"free": True, "token": self._token}).encode(), self._version)

    def _renew_often(self) -> None:
        while not self._done.wait(SECONDS / 4):
            # Where the store fails, check() finds out when time is up.
            with contextlib.suppress(HbxError):
                self.renew()

    def _text(self) -> bytes:
        me = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "process": os.getpid(),
            "namespace": _namespace(),
            "started": _started(os.getpid()),
            "seconds": SECONDS,
            "token": self._token,
            "beat": self._beat,
        }
        return json.dumps(me).encode()

    def _check_free(self, found: bytes) -> None:
        try:
            holder = json.loads(found)
        except ValueError:
            return  # nothing that a writer of this package has written
        if not isinstance(holder, dict) or holder.get("free"):
            return
        if holder.get("namespace") == _namespace() != "":
            pid = holder.get("process")
            if not isinstance(pid, int) or _started(pid) != holder.get("started"):
                return  # it has died on this machine
        seconds = holder.get("seconds")
        left = (seconds if isinstance(seconds, int | float) else SECONDS) + _SLACK - self._age()
        if left > 0:
            raise AtlasLockedError(
                f"another writer holds {self._place} ({str(holder.get('holder'))[:200]}); wait until it has "
                f"finished and try again. If it has died, its lease ends in {left:.0f} s"
            )

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the clock of the store."""
        import obstore

        probe = self._place / FOLDER / f"clock-{self._token}"
        put(probe, b"")
        try:
            store = store_of(probe)
            now = obstore.head(store, probe.key)["last_modified"]
            return (now - obstore.head(store, self._object.key)["last_modified"]).total_seconds()
        except Exception as error:
            fail(self._object, error)
        finally:
            remove([probe])


def _namespace() -> str:
    """What tells the processes of this machine or container from others; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in ticks of the kernel; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
