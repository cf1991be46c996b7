"""Which thread brings which chunk, so that no chunk comes twice while several threads need it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

_OFFSETS = 44  # bits of a key that are the offset in an object; the others number the object
MOST_OBJECTS = 1 << (63 - _OFFSETS)
"""Objects that keys can tell apart."""


def keys_of(objects: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """int64, (k,). One number for the object and the first byte of each chunk."""
    found: np.ndarray = (objects.astype(np.int64) << _OFFSETS) | offset.astype(np.int64)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Chunks that one thread brings, so that others wait for them instead of bringing them too.

    Attributes
    ----------
    keys
        int64. The chunks.
    done
        Set when they are there, or could not be brought.
    """

    keys: np.ndarray
    done: threading.Event


class Claims:
    """The claims of all threads. It can be used from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: list[Claim] = []

    def claim(self, objects: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, Claim, list[Claim]]:
        """Say that this thread brings chunks that are missing, all but those that other threads bring now.

        Returns
        -------
        tuple
            bool, (k,): which of the chunks are for this thread to bring; its claim, to be given to
            :meth:`release`; and the claims of others, which are to be waited for after that.
        """
        keys = keys_of(objects, offset)
        mine = np.ones(len(keys), bool)
        others = []
        with self._lock:
            for claim in self._coming:
                theirs = np.isin(keys, claim.keys)
                if theirs.any():
                    others.append(claim)
                    mine &= ~theirs
            own = Claim(keys[mine], threading.Event())
            self._coming.append(own)
        return mine, own, others

    def release(self, claim: Claim) -> None:
        """Let others look for the chunks of a claim."""
        with self._lock:
            self._coming.remove(claim)
        claim.done.set()
