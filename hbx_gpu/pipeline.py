"""DALI runs the loader: a real DALI pipeline that our threads feed, one sample per batch.

A thread takes finished batches from the loader, feeds them and starts DALI's run; the consumer's thread picks
up outputs without a copy. What DALI cannot carry travels beside it, in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._loading.dali.feed import Feeder, finished, rebuild, run_on, take_outputs
from hbx_gpu._loading.loader import Ahead, CellLoader
from hbx_gpu.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from hbx_gpu.transforms import Transform

Graph = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class DaliOptions:
    """How a loader's pipelines are made; see :func:`cell_pipeline`.

    Attributes
    ----------
    device_id
        The GPU that batches are on; None: the CPU.
    """

    graph: Graph | None = None
    prefetch_queue_depth: int = 2
    num_threads: int | None = None
    seed: int | None = None
    device_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefetch_queue_depth", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@functools.cache
def missing() -> str | None:
    """What keeps DALI from being used; None if nothing does. Imports it."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali"):
            return "nvidia.dali is not installed: pip install 'hbx_gpu[dali]'"
        return f"nvidia.dali cannot be imported ({error}): install it anew with pip install 'hbx_gpu[dali]'"
    return None


def require() -> None:
    """Import DALI.

    Raises
    ------
    DeviceUnavailableError
        It cannot be; names the extra to install.
    """
    reason = missing()
    if reason is not None:
        raise DeviceUnavailableError(
            f"batches were to go through DALI, but {reason}. "
            'executor="auto" hands them over directly where there is no DALI'
        )


def cell_pipeline(
    dataset: Any,
    sampler: Any,
    *,
    device: Any = "cpu",
    layout: str = "dense",
    dtype: str = "float32",
    transform: Transform | list[Transform] | None = None,
    graph: Graph | None = None,
    prefetch_queue_depth: int = 2,
    num_threads: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> CellPipeline:
    """A loader whose batches go through a DALI pipeline, and through DALI operators of yours.

    Parameters
    ----------
    dataset, sampler, device, layout, dtype, transform
        As for :func:`hbx_gpu.dataloader.make_loader`.
    graph
        Called with the fields of a batch as DALI ``DataNode`` s by name; returns those that come out: a dict
        (what the fields of a batch are called), or a tuple (batches are tuples then). A field has one sample
        per batch, without layout: ``X`` (n_rows, n_features), metadata (n_rows,), ``index``. A sparse batch
        is ``X.indices``, ``X.values`` and ``X.offsets``, and becomes a tensor again if all three come out.
        Metadata that is no number stays outside, in its place in the dict. With ``dtype="bfloat16"``, which
        DALI does not have, there is no graph. None: fields pass as they are.
    prefetch_queue_depth
        Batches inside DALI that the consumer has not received. They come on top of `memory_budget`: on the
        CPU twice, as DALI copies what it hands out.
    num_threads
        DALI's own threads (default: the cores this process may use).
    seed
        With epoch and rank, of DALI's random operators (default: the sampler's).
    **kwargs
        As for :func:`hbx_gpu.dataloader.make_loader`.

    Returns
    -------
    CellPipeline
        Iterate it for torch tensors, hand it to :func:`jax_batches`, or take :meth:`CellPipeline.pipeline`
        for a plugin of DALI's.

    Raises
    ------
    DeviceUnavailableError
        DALI or the device cannot be used; says what is missing.
    ValueError
        Options that do not go together, as for :func:`hbx_gpu.dataloader.make_loader`.
    """
    from hbx_gpu._loading.make import build_loader

    if graph is not None and dtype == "bfloat16":
        raise ValueError(
            "DALI has no bfloat16, so a graph would compute on its bits; ask for float32 or float16 and turn "
            'the batch into bfloat16 behind the graph: batch["X"].bfloat16()'
        )
    require()
    loader = build_loader(
        dataset,
        sampler,
        device=device,
        layout=layout,
        dtype=dtype,
        transform=transform,
        dali=DaliOptions(graph, prefetch_queue_depth, num_threads, seed),
        **kwargs,
    )
    assert isinstance(loader, CellPipeline)
    return loader


class CellPipeline(CellLoader):
    """A :class:`~hbx_gpu._loading.loader.CellLoader` whose batches go through DALI.

    Every iteration makes a DALI pipeline of its own, so that random operators depend on seed, epoch and rank
    alone. Made by :func:`cell_pipeline` and by ``make_loader(executor="dali")``.
    """

    def __init__(self, *args: Any, dali: DaliOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dali = dali
        self._feeders: list[Feeder] = []
        self._run: _Run | None = None
        self._restored: dict[str, Any] | None = None  # state of random operators to begin with
        self._position = 0  # in the epoch, where the next iteration begins

    def _read_ahead(self, skip: int) -> Ahead:
        ahead = super()._read_ahead(skip)
        checkpoint = self._restored["checkpoint"] if self._restored else None
        self._run = _Run(ahead, self.dali, self.noise_seed(), checkpoint)
        self._restored, self._position = None, 0
        return self._run

    def noise_seed(self) -> int:
        """Of DALI's random operators; after the sampler's iteration began, which may draw a seed."""
        sampler: Any = self.batch_sampler
        seed = self.dali.seed
        if seed is None:
            seed = int(getattr(sampler, "seed", 0))
        entropy = [seed, self._current_epoch(), self._rank(), self._position]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _current_epoch(self) -> int:
        return int(getattr(self.batch_sampler, "epoch", self._epoch))

    def _rank(self) -> int:
        return int(getattr(self.batch_sampler, "rank", 0))

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`CellLoader.set_epoch`."""
        before, self._run = self._current_epoch(), None
        super().set_epoch(epoch)
        if self._current_epoch() != before:
            self._restored, self._position = None, 0

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`CellLoader.state_dict`; with a graph also the state of DALI's random operators."""
        state = super().state_dict()
        if self._run is not None:
            checkpoint = self._run.checkpoint()
            if checkpoint is not None:
                state["graph"] = {"rank": self._rank(), "checkpoint": checkpoint}
        elif self._restored is not None:
            state["graph"] = self._restored
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`CellLoader.load_state_dict`.

        Random operators go on where they were on the rank that the state is from; on another rank, or with a
        state of a loader without a graph, they begin anew with a seed of their own.
        """
        super().load_state_dict(state)
        self._run = None
        graph = state.get("graph")
        same = graph is not None and self.dali.graph is not None and graph["rank"] == self._rank()
        self._restored = graph if same else None
        self._position = int(state["sampler"]["cells"] if "sampler" in state else state["delivered"])

    def pipeline(self) -> Any:
        """A ``nvidia.dali.Pipeline`` for an iterator of DALI's, such as ``DALIGenericIterator``.

        Its attribute `names` says what the outputs are called, in order. It ends with ``StopIteration``
        behind the last batch of an epoch; ``reset()`` begins the next one, whose order is that of
        :meth:`set_epoch`. Outputs only: metadata that is no number is not there, bfloat16 comes as uint16,
        sparse batches in three parts, and positions are not counted for :meth:`state_dict`. Waits for the
        first batch. ``close()`` ends its thread.
        """
        from hbx_gpu._loading.dali.graph import FedPipeline

        return FedPipeline.begin(self)

    def begin_epoch(self, feed: Callable[[Ahead], Feeder]) -> Feeder:
        """What a pipeline for DALI's iterators is fed by in the coming epoch; ended by :meth:`close`."""
        ahead = super()._read_ahead(0)
        try:
            feeder = feed(ahead)
        except BaseException:
            ahead.close()
            raise
        self._feeders.append(feeder)
        return feeder

    def close(self) -> None:
        """See :meth:`CellLoader.close`; pipelines from :meth:`pipeline` end too."""
        super().close()
        for feeder in self._feeders:
            feeder.close()
        self._feeders.clear()


def jax_batches(loader: CellLoader) -> Iterator[Any]:
    """Batches of any loader with a `layout` as JAX arrays, without a copy where JAX takes the memory.

    Yields
    ------
    dict, or tuple
        As the loader's, with ``jax.Array`` for dense tensors and ``jax.experimental.sparse.BCSR`` for sparse
        ones. JAX makes 64-bit numbers 32-bit, by a copy, unless ``jax_enable_x64`` is set. Anything else
        stays as it is.
    """
    import torch
    from jax import dlpack
    from jax.experimental import sparse

    def converted(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout is not torch.sparse_csr:
            return dlpack.from_dlpack(value)
        parts = value.values(), value.col_indices(), value.crow_indices()
        return sparse.BCSR(tuple(map(dlpack.from_dlpack, parts)), shape=tuple(value.shape))

    for batch in loader:
        if not isinstance(batch, dict):
            yield tuple(map(converted, batch))
        else:
            yield {name: converted(value) for name, value in batch.items()}


class _Run(Ahead):
    """One iteration through DALI: pipeline and feeding thread begin with the first ``next()``."""

    def __init__(self, ahead: Ahead, options: DaliOptions, seed: int, checkpoint: bytes | None) -> None:
        self._ahead, self._options, self._seed = ahead, options, seed
        self._checkpoint = checkpoint
        self.recorder = ahead.recorder
        self._feeder: Feeder | None = None
        self._received = 0
        self._closed = False

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        try:
            feeder = self._feeder or self._begin()
            packed = feeder.take()
            with feeder.lock:
                outputs = take_outputs(feeder.built, packed, self._options.device_id)
            feeder.give_room()
            self.cells = packed.cells
            self._received += 1
            return rebuild(feeder.built, packed, outputs)
        except StopIteration:
            self._checkpoint, self._received = None, 0  # a new epoch begins with a new seed
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def _begin(self) -> Feeder:
        from hbx_gpu._loading.dali.graph import build

        options = self._options
        batches = finished(self._ahead, options.device_id)
        first = next(batches)
        # DALI's own depth is how many runs it starts at once before the first output; ours is the room.
        built = build(first, options, depth=1, seed=self._seed, checkpoint=self._checkpoint)
        self._feeder = Feeder(
            run_on(first, batches), built, self._ahead, room=options.prefetch_queue_depth, start=True
        )
        return self._feeder

    def checkpoint(self) -> bytes | None:
        """State of random operators behind the batch received last; None: as at the begin of an epoch."""
        feeder = self._feeder
        if self._options.graph is not None and self._received and feeder is not None and not feeder.closed:
            with feeder.lock:
                self._checkpoint = bytes(feeder.built.pipe.checkpoint())
        return self._checkpoint

    def close(self) -> None:
        """See :class:`Ahead`."""
        if not self._closed:
            try:
                self.checkpoint()
            except RuntimeError:  # a pipeline that broke has no state
                self._checkpoint = None
            self._closed = True
            if self._feeder is not None:
                self._feeder.close()
                self._feeder = None
            self._ahead.close()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()
