"""Makes DALI pipelines; the one module that imports DALI."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from hbx_gpu._devices import cores
from hbx_gpu._loading.dali.feed import Built, Feeder, Packed, finished, run_on
from hbx_gpu._loading.options import DaliOptions
from hbx_gpu._loading.read_ahead import Ahead

if TYPE_CHECKING:
    from collections.abc import Callable


def build(
    packed: Packed,
    options: DaliOptions,
    *,
    depth: int,
    seed: int,
    checkpoint: bytes | None = None,
    kind: type[Pipeline] = Pipeline,
) -> Built:
    """A pipeline for batches like `packed`, ready to be fed.

    Raises
    ------
    TypeError
        The user's graph returns values that are not outputs of DALI operators.
    """
    pipe = kind(
        batch_size=1,
        num_threads=options.num_threads or cores(),
        device_id=options.device_id,
        prefetch_queue_depth=depth,
        seed=seed,
        enable_checkpointing=options.graph is not None,
        checkpoint=checkpoint,
    )
    # Operators get names of ours: those of columns may be anything.
    operators = {name: f"field_{i}" for i, name in enumerate(packed.tensors)}
    with pipe:
        nodes = {
            name: fn.external_source(
                name=operator,
                device="cpu" if options.device_id is None else "gpu",
                batch=True,
                no_copy=True,
            )
            for name, operator in operators.items()
        }
        found = nodes if options.graph is None else options.graph(dict(nodes))
        named, outputs = isinstance(found, dict), _by_name(found)
        pipe.set_outputs(*outputs.values())
    pipe.build()
    inputs = {name: operator for name, operator in operators.items() if _is_used(pipe, operator)}
    return Built(pipe, inputs, tuple(outputs), named)


def _by_name(found: object) -> dict[str, DataNode]:
    """Check what the user's graph returned, and return it by name; outputs without names are numbered."""
    outputs = found
    if isinstance(found, DataNode):
        outputs = {"output_0": found}
    elif isinstance(found, list | tuple):
        outputs = {f"output_{i}": output for i, output in enumerate(found)}
    if (
        not isinstance(outputs, dict)
        or not outputs
        or not all(isinstance(name, str) and isinstance(node, DataNode) for name, node in outputs.items())
    ):
        raise TypeError(
            "a graph returns what comes out of the pipeline: a dict of DALI DataNodes by name, or a tuple of "
            f"DataNodes; got {found!r}"
        )
    return outputs


def _is_used(pipe: Pipeline, operator: str) -> bool:
    """Whether an output needs this input: DALI drops it otherwise, and takes no data for it."""
    try:
        pipe.input_feed_count(operator)
    except KeyError:
        return False
    return True


class Epochs(Protocol):
    """The part of a loader that its pipeline uses."""

    dali: DaliOptions

    def noise_seed(self) -> int:
        """Seed of DALI's random operators in the epoch that begins."""

    def begin_epoch(self, feed: Callable[[Ahead], Feeder]) -> Feeder:
        """Begin an epoch, with what `feed` makes of its batches."""


class FedPipeline(Pipeline):
    """A pipeline that takes what its feeder has fed whenever a run is started, whoever starts it.

    Attributes
    ----------
    names
        Names of the outputs, in order.
    """

    names: tuple[str, ...] = ()
    _inputs: dict[str, str]
    _loader: Epochs
    _feeder: Feeder
    _over: bool
    _in_use: deque[Packed]

    @classmethod
    def begin(cls, loader: Epochs) -> FedPipeline:
        """A pipeline over the loader's coming epoch."""
        options = loader.dali

        def feed(ahead: Ahead) -> Feeder:
            batches = finished(ahead, options.device_id)
            first = next(batches, None)
            if first is None:
                raise ValueError("this epoch has no batches to tell the fields of a pipeline from")
            seed, depth = loader.noise_seed(), options.prefetch_queue_depth
            built = build(first, options, depth=depth, seed=seed, kind=cls)
            return Feeder(run_on(first, batches), built, ahead, room=depth, start=False)

        feeder = loader.begin_epoch(feed)
        pipe: FedPipeline = feeder.built.pipe
        pipe.names, pipe._inputs = feeder.built.names, feeder.built.inputs
        pipe._loader, pipe._feeder, pipe._over = loader, feeder, False
        # DALI reads what it was fed until the run is over, which is when its output has been consumed.
        pipe._in_use = deque(maxlen=options.prefetch_queue_depth + 2)
        return pipe

    def iter_setup(self) -> None:
        """Called by DALI when a run is started: waits until there is something to run on."""
        try:
            self._in_use.append(self._feeder.take())
        except StopIteration:
            self._over = True
            raise
        self._feeder.give_room()

    def reset(self) -> None:
        """Begin the next epoch, once this one has ended."""
        if self._over:
            self._over = False
            self._feeder.close()
            options = self._loader.dali
            built = Built(self, self._inputs, self.names, named=True)

            def feed(ahead: Ahead) -> Feeder:
                batches = finished(ahead, options.device_id)
                return Feeder(batches, built, ahead, room=options.prefetch_queue_depth, start=False)

            self._feeder = self._loader.begin_epoch(feed)
        super().reset()  # type: ignore[no-untyped-call]  # DALI does not annotate it

    def close(self) -> None:
        """End the thread that feeds."""
        self._feeder.close()
