"""Limits that a test sets in another process."""

from __future__ import annotations

import resource
import signal


def no_shared_memory(_: int) -> None:
    """Let this process write no file of more than 100 bytes, shared memory included."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
