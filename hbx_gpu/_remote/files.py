"""An object in storage as a file that can be read at any place, for libraries that want one."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, BinaryIO

from hbx_gpu._remote import stores
from hbx_gpu._remote.places import Place, is_remote
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu.errors import ReplacedError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK = 1 << 20
_KEPT = 64  # blocks


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, or an object in storage, for reading."""
    if is_remote(path):
        return io.BufferedReader(RemoteFile(Place(os.fspath(path))))
    return open(path, "rb")


class RemoteFile(io.RawIOBase):
    """An object as a file for reading: whole blocks are fetched, and the last ones kept.

    Parameters
    ----------
    place
        The object.

    Raises
    ------
    FileNotFoundError
        There is no such object.
    """

    def __init__(self, place: Place) -> None:
        found = stores.head(place)
        if found is None:
            raise FileNotFoundError(f"there is no object {place}")
        self._place, self._info = place, found
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return str(self._place)

    @property
    def info(self) -> ObjectInfo:
        """Size and version of the object."""
        return self._info

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.nbytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer as far as the object goes; returns the bytes read."""
        target = memoryview(buffer).cast("B")
        wanted = max(0, min(len(target), self._info.nbytes - self._at))
        done = 0
        while done < wanted:
            number, inside = divmod(self._at + done, _BLOCK)
            part = self._block(number)[inside : inside + wanted - done]
            target[done : done + len(part)] = part
            done += len(part)
        self._at += done
        return done

    def _block(self, number: int) -> bytes:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        begin = number * _BLOCK
        end = min(begin + _BLOCK, self._info.nbytes)
        content, info = stores.get(self._place, {"range": (begin, end)})
        if info != self._info or len(content) != end - begin:
            raise ReplacedError(f"{self._place} was replaced while it was read; open it again")
        with self._lock:
            self._blocks[number] = bytes(content)
            while len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
            return self._blocks[number]
