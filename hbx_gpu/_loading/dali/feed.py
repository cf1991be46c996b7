"""Pass batches through a DALI pipeline: a thread feeds their fields, and the outputs become batches again."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hbx_gpu._loading.closing import THREADS
from hbx_gpu._loading.read_ahead import Ahead
from hbx_gpu._protocols import TensorBatch
from hbx_gpu._streams import Held, own_stream

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline
    from torch import Tensor

SPARSE_PARTS = ("indices", "values", "offsets")


@dataclass(slots=True)
class Packed:
    """A finished batch: what DALI carries of it, and what it does not.

    Attributes
    ----------
    tensors
        Tensors by field, in dtypes that DALI has.
    keys
        Keys of the batch in its order, as paths where it holds dicts. The name of a field is its path, with
        dots.
    kept
        Entries of the batch that are not tensors, by path.
    sparse
        Shape of each sparse tensor.
    bfloat16
        Fields whose bits are passed as uint16.
    cells
        Number of rows.
    """

    cells: int
    keys: list[tuple[str, ...]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[tuple[str, ...], object] = field(default_factory=dict)
    sparse: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bfloat16: set[str] = field(default_factory=set)


def pack(batch: TensorBatch, cells: int) -> Packed:
    """Take a batch apart without copying.

    Raises
    ------
    ValueError
        Two fields have the same name.
    """
    import torch

    flat = dict(_flat(batch))
    packed = Packed(cells, list(flat))
    for path, value in flat.items():
        if not isinstance(value, torch.Tensor):
            packed.kept[path] = value
            continue
        name = ".".join(path)
        if name in packed.tensors or name in packed.sparse:
            raise ValueError(f"two fields of the batch are called {name!r}; rename the column or the space")
        parts = {name: value}
        if value.layout is torch.sparse_csr:
            packed.sparse[name] = tuple(value.shape)
            arrays = value.col_indices(), value.values(), value.crow_indices()
            parts = {f"{name}.{part}": array for part, array in zip(SPARSE_PARTS, arrays, strict=True)}
        for part, tensor in parts.items():
            if tensor.dtype is torch.bfloat16:  # DALI has no such type
                packed.bfloat16.add(part)
                tensor = tensor.view(torch.uint16)
            packed.tensors[part] = tensor.contiguous()
    return packed


def _flat(
    batch: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """The entries of a batch, of dicts inside it too, with their paths."""
    for key, value in batch.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def finished(ahead: Ahead, device_id: int | None) -> Iterator[Packed]:
    """Batches whose memory is written: DALI neither waits for other streams nor copies what it is fed."""
    if device_id is None:
        context: AbstractContextManager[object] = contextlib.nullcontext()
        stream = None
    else:
        import torch

        stream = own_stream(device_id, "dali")
        # An event that does not spin. torch's debug mode for hidden waits counts only those of streams.
        written = torch.cuda.Event(blocking=True)
        context = torch.cuda.stream(stream)

    def make() -> Packed | None:
        with context:
            batch = next(ahead, None)
            if batch is None:
                return None
            assert isinstance(batch, dict)  # a layout was asked for
            packed = pack(batch, ahead.cells)
            if stream is not None:
                written.record(stream)
                written.synchronize()
        return packed

    # No name here may keep a batch while the consumer has it.
    return iter(make, None)


def take_outputs(built: Built, packed: Packed, device_id: int | None, held: Held) -> list[Tensor]:
    """The outputs of the next run as torch tensors, ordered into the current stream; `held` keeps them."""
    import torch

    if device_id is None:
        found = built.pipe.share_outputs()
    else:
        stream = torch.cuda.current_stream(device_id)
        found = built.pipe.share_outputs(cuda_stream=stream)
        for tensor in packed.tensors.values():
            # DALI is done with what it was fed when `stream` gets here, and not before.
            tensor.record_stream(stream)
    built.pipe.release_outputs()
    from torch.utils.dlpack import from_dlpack

    outputs = [from_dlpack(output.as_tensor())[0] for output in found]
    if device_id is not None:
        held.hand_over(outputs, stream)
    return outputs


def rebuild(packed: Packed, outputs: Mapping[str, Tensor]) -> TensorBatch:
    """Make a batch of outputs by name, with keys in their order and the entries that DALI does not carry."""
    import torch

    found = dict(outputs)
    for name in packed.bfloat16 & found.keys():
        if found[name].dtype is torch.uint16:
            found[name] = found[name].view(torch.bfloat16)
    batch: TensorBatch = {}
    for path in packed.keys:
        name = ".".join(path)
        if path in packed.kept:
            value: object = packed.kept[path]
        elif name in packed.sparse:
            parts = [f"{name}.{part}" for part in SPARSE_PARTS]
            if not all(part in found for part in parts):
                continue
            value = _sparse(name, [found.pop(part) for part in parts], packed.sparse[name])
        elif name in found:
            value = found.pop(name)
        else:
            continue
        inner = batch
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return batch | found


def _sparse(key: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    import torch

    indices, values, offsets = parts
    if len(indices) != len(values) or len(offsets) != shape[0] + 1:
        raise ValueError(
            f"the graph returns {len(values)} {key}.values, {len(indices)} {key}.indices and {len(offsets)} "
            f"{key}.offsets for {shape[0]} rows; rename those that are not a sparse matrix any more"
        )
    # They came out of one, and checking would wait for the device.
    return torch.sparse_csr_tensor(offsets, indices, values, size=shape, check_invariants=False)


class Feeder:
    """A thread that feeds batches to a pipeline, as many as there is room for, and says what it has fed.

    Parameters
    ----------
    batches
        Batches, from :func:`finished`.
    ahead
        Iteration that the batches come from; it is closed with the feeder.
    room
        Number of batches that may be fed before one must be taken.
    start
        Whether to start a run for each batch; otherwise the consumer starts runs.

    Attributes
    ----------
    built
        The pipeline; the reference is dropped at the end.
    lock
        Lock that is held while the pipeline is called.
    """

    def __init__(
        self, batches: Iterator[Packed], built: Built, ahead: Ahead, *, room: int, start: bool
    ) -> None:
        self.built: Any = built
        self.lock = threading.Lock()
        self._ahead, self._start = ahead, start
        self._room = threading.Semaphore(room)
        self._fed: queue.SimpleQueue[Packed | BaseException] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, args=(batches,), name=f"{THREADS}-dali", daemon=True
        )
        self._thread.start()
        # Registered after DALI's own, and so called before it takes the pipeline away from under the thread.
        atexit.register(self.close)

    @property
    def closed(self) -> bool:
        return self._closing

    def _run(self, batches: Iterator[Packed]) -> None:
        try:
            while self._feed_one(batches):
                pass
            self._fed.put(StopIteration())
        except BaseException as error:
            self._fed.put(error)

    def _feed_one(self, batches: Iterator[Packed]) -> bool:
        self._room.acquire()
        packed = None if self._closing else next(batches, None)
        if packed is None:
            return False
        with self.lock:
            if self._closing:
                return False
            self.built.feed(packed)
            if self._start:
                self.built.pipe.schedule_run()
        self._fed.put(packed)
        return True

    def take(self) -> Packed:
        """The next batch fed; waits for it.

        Raises
        ------
        StopIteration
            There is none.
        """
        packed = self._fed.get()
        if isinstance(packed, BaseException):
            self._fed.put(packed)  # whoever asks again gets the same answer
            raise packed
        return packed

    def give_room(self) -> None:
        """A batch was taken: another may be fed."""
        self._room.release()

    def close(self) -> None:
        """End the thread; returns when it has ended and DALI reads no batch any more."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        self._room.release()
        self._ahead.close()
        self._thread.join()
        if self._start:
            with contextlib.suppress(RuntimeError):  # a pipeline that broke has no more outputs
                while not self.built.pipe.empty():
                    self.built.pipe.share_outputs()  # waits
                    self.built.pipe.release_outputs()
        self.built = None
        self._fed.put(StopIteration())


def run_on(first: Packed, rest: Iterator[Packed]) -> Iterator[Packed]:
    """`first`, then the others."""
    return itertools.chain(iter([first]), rest)


@dataclass(frozen=True, slots=True)
class Built:
    """A pipeline and what its inputs and outputs mean.

    Attributes
    ----------
    inputs
        Operator that each field is fed to; fields that no output needs are left out.
    names
        Names of the outputs.
    named
        Whether batches are dicts.
    """

    pipe: Pipeline
    inputs: dict[str, str]
    names: tuple[str, ...]
    named: bool

    def feed(self, packed: Packed) -> None:
        """Hand a batch to the inputs, one sample per field. It is not copied: keep it until it came out."""
        from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # torch lacks a stub of it

        for name, operator in self.inputs.items():
            # DLPack says which device it is on, and has every type that fields have.
            self.pipe.feed_input(operator, to_dlpack(packed.tensors[name][None]))
