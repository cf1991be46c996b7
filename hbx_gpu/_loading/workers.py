"""Worker processes: why they did not start or ended, and how their batches are handed over."""

from __future__ import annotations

import multiprocessing.process
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hbx_gpu.errors import ResourceError

_GUARD = (
    "worker processes are started by running the script again, up to what "
    '`if __name__ == "__main__":` guards. Put the training loop into a function, call it under that guard, '
    "or use num_workers=0 (the default), where threads read ahead"
)


def refuse_in_workers() -> None:
    """Refuse to start workers while this process, a worker itself, is still importing the script.

    Raises
    ------
    RuntimeError
        The script lacks a guard, which the message names.
    """
    # multiprocessing makes the same check, with a longer message.
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(f"this script starts worker processes without a __main__ guard: {_GUARD}")


@contextmanager
def explained() -> Iterator[None]:
    """Add likely reasons to the error of a worker that died."""
    try:
        yield
    except (RuntimeError, BrokenPipeError, EOFError) as error:
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise RuntimeError(
            f"a worker process ended before it gave a batch ({error}). If its own message above names "
            f"__main__: {_GUARD}. Otherwise it was killed, most often for want of memory: fewer workers, or "
            "num_workers=0, take less"
        ) from error


@dataclass(frozen=True)
class Handover:
    """A collate whose tensors lie in shared memory when a worker process returns them.

    Torch puts them there on a thread of its own, which drops a batch that does not fit: the consumer would
    wait for it forever.

    Parameters
    ----------
    collate
        What makes a batch.
    """

    collate: Callable[[object], object]

    def __call__(self, samples: object) -> object:
        """Make a batch and move its tensors to shared memory.

        Raises
        ------
        ResourceError
            There is too little shared memory.
        """
        batch = self.collate(samples)
        try:
            _share(batch)
        except RuntimeError as error:
            raise ResourceError(
                f"a worker process cannot hand over a batch: {error}. Shared memory (/dev/shm) is full or "
                "limited: give the container more (docker run --shm-size), use smaller batches, or "
                "num_workers=0, where threads read ahead and nothing is handed over"
            ) from error
        return batch


def _share(batch: object) -> None:
    if isinstance(batch, torch.Tensor):
        if batch.layout is torch.strided:
            batch.share_memory_()
        elif batch.layout is torch.sparse_csr:
            _share([batch.crow_indices(), batch.col_indices(), batch.values()])
    elif isinstance(batch, Mapping):
        _share(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for part in batch:
            _share(part)
