"""The device engine as an engine of `encode`: kernels of tokens, emulated on the CPU or on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from hbx_gpu._engine.device.backend import Backend, Slot
from hbx_gpu._engine.device.records import element_type
from hbx_gpu.tokens._by_row import reference
from hbx_gpu.tokens._cells import Cells, Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._device.batch import DeviceTokens, FlatRows, Wanted
from tests.emulation.backend import EmulatedBackend


class Emulated:
    """See :class:`hbx_gpu.tokens._cells.Engine`.

    Parameters
    ----------
    order
        Which thread runs next where several could; ``"cuda"`` is a GPU.
    shared_keys
        Keys that a block sorts in shared memory.
    """

    def __init__(self, order: str = "forward", shared_keys: int = 2112) -> None:
        self.backend: Backend
        if order == "cuda":
            from hbx_gpu._engine.device.cuda import CudaBackend

            self.backend = CudaBackend(0)
        else:
            self.backend = EmulatedBackend(order)
        self.shared_keys = shared_keys

    def __call__(self, compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
        """Arrays by name, as other engines make them; the attention mask is compared here."""
        if not len(cells):
            return reference(compiled, cells, options)
        tokens = DeviceTokens(compiled, options, self.backend, shared_keys=self.shared_keys)
        lengths = np.diff(cells.offsets)
        kind = element_type(cells.values.dtype, "values")
        sent = [
            self._sent(array)
            for array in (
                cells.columns.astype(np.int32), cells.values, np.asarray(cells.offsets, np.int64)
            )
        ]  # fmt: skip
        columns, values, offsets = (np.uint64(tensor.data_ptr()) for tensor in sent)
        rows = FlatRows(columns, values, offsets, kind, len(cells.columns), lengths)
        wanted = Wanted(
            cells.numbers, cells.front, cells.seed, cells.epoch, cells.batch, cells.where, cells.obs
        )
        slot = Slot(self.backend)
        made = tokens.order(rows, wanted, slot)
        slot.wait()
        found = {
            name: np.int32(tensor) if isinstance(tensor, int) else tensor.cpu().numpy()
            for name, tensor in made.result().items()
            if name not in cells.obs
        }
        lengths = np.asarray(found["lengths"])
        if options.padding == "packed":
            assert found.pop("cu_seqlens").tolist() == [0, *np.cumsum(lengths)]
            assert found.pop("max_seqlen") == lengths.max()
        else:
            mask = found.pop("attention_mask")
            assert np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None])
        return {name: np.asarray(array) for name, array in found.items()}

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the device."""
        raw = np.ascontiguousarray(array).view(np.uint8)
        slot = Slot(self.backend)
        slot.reserve(0, 0, max(16, raw.nbytes))
        slot.side[: raw.nbytes] = raw
        tensor: torch.Tensor = self.backend.empty(max(16, raw.nbytes), "uint8")
        self.backend.send(slot.side[: max(16, raw.nbytes)], tensor)
        self.backend.event().wait()
        return tensor
