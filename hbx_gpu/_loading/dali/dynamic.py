"""Hand batches over through DALI's dynamic mode, in which tensors pass without a copy.

The operators of the user run one batch ahead, on a thread of their own; on a GPU they are ordered when their
batch is asked for, because they run there. There is no pipeline, thread or queue of DALI's in between:
`hbx_gpu._loading.dali.loader` has those, for graphs that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._loading.closing import close_dropped
from hbx_gpu._loading.dali.feed import pack, rebuild
from hbx_gpu._loading.dali.producer import Producer
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.options import DynamicOptions, Operators
from hbx_gpu._loading.read_ahead import Ahead
from hbx_gpu._loading.sampler_attributes import rank_of, seed_of
from hbx_gpu._streams import Held

if TYPE_CHECKING:
    from torch import Tensor

_CPU = (1, 0)  # as DLPack names devices


class DynamicLoader(CellLoader):
    """A :class:`~hbx_gpu._loading.loader.CellLoader` that hands batches over through DALI's dynamic mode.

    Made by ``make_loader(executor="dali")``. What random operators draw is a function of seed, epoch, rank
    and the number of the batch, so an epoch that is resumed goes on with the same noise.
    """

    def _read_ahead(self) -> Ahead:
        ahead, options = super()._read_ahead(), self.options.dali
        if not isinstance(options, DynamicOptions):
            options = DynamicOptions()
        seed = options.seed
        if seed is None:
            seed = seed_of(self._order)
        entropy = (seed, self.epoch, rank_of(self._order))
        return HandOver(ahead, options, entropy, self._order.n_done)


class HandOver(Ahead):
    """The batches of one iteration, as DALI tensors in between.

    Parameters
    ----------
    ahead
        The batches.
    options
        The operators of the user, and the GPU that batches are on.
    entropy, first
        What the seeds of random operators follow from, besides the number of the batch; and the number of the
        first one.
    """

    def __init__(
        self, ahead: Ahead, options: DynamicOptions, entropy: tuple[int, ...], first: int = 0
    ) -> None:
        self._ahead = ahead
        self._batches = _Batches(ahead, options, entropy, first)
        self.recorder = ahead.recorder
        self._producer: Producer[tuple[object, int]] | None = None
        # On a GPU operators are only ordered, on the stream of the consumer, whose thread knows it.
        self._runs_ahead = options.operators is not None and options.device_id is None
        self._closed = False

    def __next__(self) -> object:
        try:
            if not self._runs_ahead:
                batch, self.cells = self._batches.make()
                return batch
            if self._producer is None:
                self._producer = Producer(self._batches.make)
            batch, self.cells = self._producer.take()
            return batch
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See :class:`Ahead`."""
        if not self._closed:
            self._closed = True
            self._ahead.close()
            if self._producer is not None:
                self._producer.close()

    def __del__(self) -> None:
        if not self._closed:
            close_dropped(self.close)


class _Batches:
    """Makes the batches of a `HandOver`, on whichever thread asks for them."""

    def __init__(self, ahead: Ahead, options: DynamicOptions, entropy: tuple[int, ...], first: int) -> None:
        self._ahead, self._options = ahead, options
        self._entropy, self._number = entropy, first
        self._held = Held()

    def make(self) -> tuple[object, int]:
        """The next batch, and its number of cells."""
        batch, cells = next(self._ahead), self._ahead.cells
        assert isinstance(batch, dict)  # a layout was asked for
        packed = pack(batch, cells)
        outputs = {name: passed(tensor) for name, tensor in packed.tensors.items()}
        if self._options.operators is not None:
            outputs = self._operate(self._options.operators, outputs)
        self._number += 1
        return rebuild(packed, outputs), cells

    def _operate(self, operators: Operators, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the operators of the user make of the fields of a batch."""
        from nvidia.dali.experimental import dynamic

        words = np.random.SeedSequence([*self._entropy, self._number]).generate_state(1, np.uint64)
        fields = {name: dynamic.as_tensor(tensor) for name, tensor in tensors.items()}
        found = operators(dict(fields), dynamic.random.RNG(seed=int(words[0])))
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(field, dynamic.Tensor) for name, field in found.items()
        ):
            raise TypeError(
                "operators return the fields that come out: a dict of DALI tensors by name (dynamic.Tensor); "
                f"got {found!r}"
            )
        outputs = {
            name: tensors[name] if field is fields.get(name) else field.torch()
            for name, field in found.items()
        }
        if self._options.device_id is not None:
            import torch

            # Kept until the consumer's stream, which waits for DALI's, has used them.
            stream = torch.cuda.current_stream(self._options.device_id)
            self._held.hand_over([*tensors.values(), *outputs.values()], stream)
        return outputs


def passed(tensor: Tensor) -> Tensor:
    """A torch tensor as DALI hands it to torch: the same memory, which it keeps alive."""
    from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]  # torch lacks a stub

    if tensor.is_cuda:
        from nvidia.dali.experimental import dynamic

        ordered: Tensor = dynamic.as_tensor(tensor).torch()  # orders the streams of both
        return ordered
    from nvidia.dali.tensors import TensorCPU

    held: Any = TensorCPU(to_dlpack(tensor), "")  # its stub lacks __dlpack__
    return from_dlpack(held.__dlpack__(None, _CPU))
