"""Tokens of one batch on a device: its arrays packed for the copy, memory, launches, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from hbx_gpu._engine.device import status
from hbx_gpu._engine.device.backend import Backend, Slot
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import _rows
from hbx_gpu.tokens._cells import Options
from hbx_gpu.tokens._compile import Compiled, renamed
from hbx_gpu.tokens._device.outputs import (
    Output,
    drafts_of,
    longest_row,
    most_tokens,
    outputs_of,
    shaped,
)
from hbx_gpu.tokens._device.recipe import DeviceRecipe
from hbx_gpu.tokens._device.records import ROWS, TOO_MANY
from hbx_gpu.tokens._draws import Draws, Step, batch_cell
from hbx_gpu.tokens._lower_sampled import Ranked, Weighted
from hbx_gpu.tokens._program import Mask
from hbx_gpu.tokens._program import Sequence as SequenceProgram
from hbx_gpu.tokens._reference_sampled import shared_genes

if TYPE_CHECKING:
    import torch

Places: TypeAlias = dict[str, int]
_BLOCK = 256
_ALIGNMENT = 16
_KEY_BYTES = 24  # of shared memory for a key
_ENTRY_BYTES = 40  # of work for each entry of the longest row
_HISTOGRAM_BYTES = 4 * 4096
_WORK_BYTES = 256 << 20
_SHARED_KEYS = 2112
_PADDINGS = ("longest", "max_length", "packed")


@dataclass(frozen=True, slots=True)
class FlatRows:
    """Rows of a flat CSR in device memory.

    Attributes
    ----------
    indices, values, offsets
        Addresses: int32, -1 where dropped; numbers of `value_type`; int64 (n_rows + 1,) of these rows.
    value_type
        Number of the values' type (:data:`hbx_gpu._engine.device.records.ELEMENT_TYPES`).
    n_elements
        Elements of the flat CSR.
    lengths
        int64, (n_rows,). Stored elements of each row.
    """

    indices: np.uint64
    values: np.uint64
    offsets: np.uint64
    value_type: int
    n_elements: int
    lengths: np.ndarray


@dataclass(frozen=True, slots=True)
class Wanted:
    """What tokens of a batch depend on beside its counts; as :class:`hbx_gpu.tokens._cells.Cells` has it."""

    numbers: np.ndarray
    front: np.ndarray
    seed: int
    epoch: int
    batch: int
    where: str
    obs: Mapping[str, np.ndarray]


@dataclass(slots=True)
class Made:
    """Tokens in the making. `result` may be asked for once `slot.busy` has passed.

    Attributes
    ----------
    slot
        Memory that status words and widths come back to; the caller gives it back.
    tensors
        All tensors that the device writes, as allocated.
    """

    slot: Slot
    tensors: list[torch.Tensor]
    _tokens: DeviceTokens
    _wanted: Wanted
    _outputs: dict[str, torch.Tensor]
    _n_rows: int
    _back: tuple[int, int]

    def result(self) -> dict[str, torch.Tensor | int]:
        """The batch, by our names.

        Raises
        ------
        InvalidDataError
            Values that are not counts, or a total above 2**53.
        """
        begin, at = self._back
        words = self.slot.side[begin : begin + 4 * (1 + self._n_rows)].view(np.uint32)
        widths = self.slot.side[at : at + 32].view(np.int64)
        self._tokens.raise_for(words, self._wanted.where)
        return self._tokens.batch_of(self._outputs, widths, self._n_rows, self._wanted.obs)


class DeviceTokens:
    """Makes tokens of rows that lie on a device. Safe to use from many threads.

    Parameters
    ----------
    compiled
        The recipe, for the dataset of the rows.
    options
        How batches are handed out.
    backend
        The device.
    shared_keys
        Keys that a block sorts in shared memory; longer rows are sorted in device memory.
    """

    def __init__(
        self, compiled: Compiled, options: Options, backend: Backend, *, shared_keys: int = _SHARED_KEYS
    ) -> None:
        self._compiled, self._options, self._backend = compiled, options, backend
        self._recipe = DeviceRecipe(compiled, options.ids_dtype, backend)
        self._outputs = outputs_of(compiled, options)
        self._n_quantiles = compiled.program.bins - 1 if isinstance(compiled.program, SequenceProgram) else 0
        room = (backend.max_shared - 8 * self._n_quantiles - (12 << 10)) // _KEY_BYTES
        self._shared_keys = max(1, min(shared_keys, room))
        self._owner = _owners(compiled)

    def order(self, rows: FlatRows, wanted: Wanted, slot: Slot) -> Made:
        """Order copies and launches that make the tokens of `rows`; waits for nothing.

        Parameters
        ----------
        rows
            Rows of the batch.
        wanted
            What else tokens depend on.
        slot
            A free slot of this backend; busy until the batch is made.
        """
        import torch

        backend, n = self._backend, len(rows.lengths)
        sent = self._arrays(rows, wanted)
        places, size = _places(sent)
        slot.reserve(0, 0, size)
        inputs: torch.Tensor = backend.empty(size, "uint8")
        base = int(inputs.data_ptr())
        record, tensors, outputs = self._record(rows, wanted, {k: base + v for k, v in places.items()})
        sent["record"] = record
        for name, array in sent.items():
            slot.side[places[name] : places[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
        try:
            backend.send(slot.side[:size], inputs)
            self._launch(n, base + places["record"], base + places["status"], int(record["work_bytes"][0]))
            begin = places["status"]
            backend.download(base + begin, slot.side[begin:size])  # status, then widths, lie at the end
        finally:
            slot.busy = backend.event()
        # Columns of obs stay views of what was sent.
        for name, ids in wanted.obs.items():
            at = places[f"obs {name}"]
            raw = inputs[at : at + ids.nbytes]
            outputs[name] = raw.view(torch.int64).view(ids.shape)
        return Made(slot, [inputs, *tensors], self, wanted, outputs, n, (begin, places["widths"]))

    def raise_for(self, words: np.ndarray, where: str) -> None:
        """Raise what the status words of a batch say, if they say anything."""
        if not words[0]:
            return
        bits = int(words[1:][np.flatnonzero(words[1:])[0]])
        logged = isinstance(self._compiled.program, Ranked) and self._compiled.program.logged
        if bits & status.BAD_COLUMN:
            raise InvalidDataError(
                f"{where}: a column number lies outside the {self._compiled.n_features} features"
            )
        if bits & status.NOT_COUNTS:
            raise _rows.not_logarithms(where) if logged else _rows.not_counts(where)
        if bits & TOO_MANY:
            raise _rows.too_many(where)
        raise RuntimeError(
            f"a kernel refused what the host told it to do (status {bits:#x}); this is a bug of hbx_gpu, "
            "please report it"
        )

    def batch_of(
        self, tensors: Mapping[str, torch.Tensor], widths: np.ndarray, n: int, obs: Mapping[str, np.ndarray]
    ) -> dict[str, torch.Tensor | int]:
        """Tensors in the shapes that users get, by our names."""
        packed = self._options.padding == "packed"
        made: dict[str, torch.Tensor | int] = {
            output.name: shaped(output, tensors[output.name], n, widths, packed) for output in self._outputs
        }
        if packed:
            made["cu_seqlens"], made["max_seqlen"] = tensors["cu_seqlens"], int(widths[3])
        return made | {name: tensors[name] for name in obs}

    @property
    def names(self) -> list[str]:
        """Names of all outputs, as the model has them."""
        own = [output.name for output in self._outputs]
        if self._options.padding == "packed":
            own += ["cu_seqlens", "max_seqlen"]
        return list(renamed(self._compiled, dict.fromkeys([*own, *self._compiled.recipe.aux])))

    def _arrays(self, rows: FlatRows, wanted: Wanted) -> dict[str, np.ndarray]:
        """What crosses for a batch; status words and widths, which come back, last."""
        compiled, n = self._compiled, len(rows.lengths)
        room = np.zeros(n + 1, np.int64)
        np.cumsum(self._room(rows.lengths), out=room[1:])
        sent = {
            "record": np.zeros(1, ROWS),
            "cells": np.ascontiguousarray(wanted.numbers, np.int64),
            "front": np.ascontiguousarray(wanted.front, np.int64),
            "room": room,
        }
        if isinstance(compiled.program, Ranked):
            shared = shared_genes(compiled.program, wanted.seed, wanted.epoch, wanted.batch)
            sent["shared"], sent["shared_columns"] = shared, self._owner[shared].astype(np.int32)
        sent |= {f"obs {name}": np.ascontiguousarray(ids, np.int64) for name, ids in wanted.obs.items()}
        return sent | {"status": np.zeros(1 + n, np.uint32), "widths": np.zeros(4, np.int64)}

    def _room(self, lengths: np.ndarray) -> np.ndarray:
        """Places for the known genes of each row."""
        if not self._compiled.program.zeros:
            return lengths
        room: np.ndarray = np.maximum(lengths, len(self._compiled.tables.known))
        return room

    def _record(
        self, rows: FlatRows, wanted: Wanted, at: Mapping[str, int]
    ) -> tuple[np.ndarray, list[torch.Tensor], dict[str, torch.Tensor]]:
        """The record of a batch, scratch tensors, and outputs by name."""
        compiled, options, backend, n = self._compiled, self._options, self._backend, len(rows.lengths)
        record = np.zeros(1, ROWS)
        for name in ("indices", "values", "offsets", "value_type", "n_elements"):
            record[name] = getattr(rows, name)
        for name in ("cells", "front", "room", "shared", "shared_columns", "widths"):
            if name in at:
                record[name] = at[name]
        n_places = int(self._room(rows.lengths).sum())
        longest = longest_row(compiled, int(rows.lengths.max(initial=0)), self._recipe.n_codes)
        work_bytes = -(-_ENTRY_BYTES * longest // _ALIGNMENT) * _ALIGNMENT
        capacity = self._capacity(rows.lengths)
        record["n_places"], record["longest"], record["work_bytes"] = n_places, longest, work_bytes
        record["capacity"] = record["gen_capacity"] = capacity
        record["seed"], record["epoch"], record["n_rows"] = wanted.seed, wanted.epoch, n
        record["front_step"] = wanted.front.shape[1] if len(wanted.front) > 1 else 0
        record["padding"], record["multiple"] = _PADDINGS.index(options.padding), options.multiple
        record["n_shared"] = self._shared_keys
        record["gen_ratio"] = self._ratio(wanted)
        scratch: list[torch.Tensor] = []
        for name, size, dtype in (
            ("genes", n_places, "int32"), ("counts", n_places, "float64"), ("n_genes", n, "int32"),
            ("totals", n, "float64"), ("known_totals", n, "float64"), ("starts", n + 1, "int64"),
            ("drafts", n * drafts_of(compiled), "int32"),
            ("work", self._grid(n, work_bytes) * work_bytes, "uint8"),
        ):  # fmt: skip
            scratch.append(backend.empty(max(1, size), dtype))
            record[name] = scratch[-1].data_ptr()
        outputs: dict[str, torch.Tensor] = {}
        for output in self._outputs:
            outputs[output.name] = backend.empty(_size(output, n, capacity), output.dtype)
            record[output.field] = outputs[output.name].data_ptr()
        if options.padding == "packed":
            outputs["cu_seqlens"] = backend.empty(n + 1, "int32")
            record["bounds"] = outputs["cu_seqlens"].data_ptr()
        return record, [*scratch, *outputs.values()], outputs

    def _capacity(self, stored: np.ndarray) -> int:
        """Tokens that outputs must have room for."""
        options, most = self._options, most_tokens(self._compiled, stored)
        if options.padding == "packed":
            return int(most.sum())
        return len(stored) * options.width(most, int(self._compiled.program.length))

    def _ratio(self, wanted: Wanted) -> float:
        """Share of genes that a split generates in this batch."""
        program = self._compiled.program
        if not isinstance(program, SequenceProgram) or program.mask != Mask.SPLIT:
            return 0.0
        draws = Draws(wanted.seed, wanted.epoch, batch_cell(wanted.batch))
        return float(program.ratios[draws.below(Step.RATIO, len(program.ratios))])

    def _grid(self, n_rows: int, work_bytes: int) -> int:
        return max(1, min(n_rows, max(1, _WORK_BYTES // work_bytes)))

    def _launch(self, n_rows: int, record: int, words: int, work_bytes: int) -> None:
        backend, recipe = self._backend, self._recipe.address
        if not n_rows:
            return
        grid, rows = self._grid(n_rows, work_bytes), np.uint64(record)
        marks = (np.uint64(words + 4), np.uint64(words))
        shared = max(_KEY_BYTES * self._shared_keys, _HISTOGRAM_BYTES) + 8 * self._n_quantiles
        backend.launch("token_genes", grid, _BLOCK, (recipe, rows, *marks), shared)
        program = self._compiled.program
        if isinstance(program, Weighted):
            backend.launch("token_weighted", grid, _BLOCK, (recipe, rows), shared)
        backend.launch("token_starts", 1, _BLOCK, (recipe, rows))
        if isinstance(program, Weighted):
            backend.launch("token_place", grid, _BLOCK, (recipe, rows, *marks))
            return
        kernel = "token_prompts"
        if isinstance(program, SequenceProgram):
            kernel = "token_sequences"
        elif isinstance(program, Ranked):
            kernel = "token_ranked"
        backend.launch(kernel, grid, _BLOCK, (recipe, rows, *marks), shared)


def _size(output: Output, n_rows: int, capacity: int) -> int:
    if output.per != "row":
        return capacity
    return n_rows * int(np.prod(output.shape, dtype=np.int64))


def _owners(compiled: Compiled) -> np.ndarray:
    """int64. Column of each id that a row of State may have to predict; -1: none."""
    if not isinstance(compiled.program, Ranked):
        return np.empty(0, np.int64)
    tables = compiled.tables
    owner = np.full(max(compiled.program.n_ids, int(tables.token.max()) + 1), -1, np.int64)
    owner[tables.token[tables.known]] = tables.known
    return owner


def _places(arrays: Mapping[str, np.ndarray]) -> tuple[Places, int]:
    """Where arrays lie in one buffer, and its size."""
    places: Places = {}
    at = 0
    for name, array in arrays.items():
        places[name] = at
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, at
