"""Which tensors a recipe's batches consist of, and how large they may become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu.tokens._cells import Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._program import Depth, Mask, Sequence, Value

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of a batch.

    Attributes
    ----------
    name
        As users know it.
    field
        Where kernels find its address (:data:`~hbx_gpu.tokens._device.records.ROWS`).
    dtype
        Its dtype.
    per
        ``"token"``: an entry for each place of the padded or packed rows; ``"generated"``: for each place of
        the second part of a split; else `shape` entries for each row.
    shape
        See `per`; () is one entry.
    """

    name: str
    field: str
    dtype: str
    per: str = "token"
    shape: tuple[int, ...] = ()


def outputs_of(compiled: Compiled, options: Options) -> list[Output]:
    """What batches of a recipe hold, ``cu_seqlens`` and ``max_seqlen`` aside."""
    program, ids = compiled.program, options.ids_dtype
    found = [Output("input_ids", "ids", ids), Output("lengths", "lengths", "int32", "row")]
    if options.padding != "packed":
        found.append(Output("attention_mask", "attention", "bool"))
    if isinstance(program, Sequence):
        return [*found, *_of_sequence(program, ids)]
    if isinstance(program, Ranked):
        n = (sum(program.tasks),)
        return [
            *found,
            Output("values", "values_out", "float32"),
            Output("task_ids", "task_ids", ids, "row", n),
            Output("task_values", "task_values", "float32", "row", n),
            Output("totals", "row_totals", "float32", "row"),
        ]
    if isinstance(program, Prompt):
        m = (len(program.metadata_masks),)
        return [
            *found,
            Output("values", "values_out", "float32"),
            *(Output(n, n, "float32") for n in ("query_mask", "total_counts", "label_weights")),
            Output("prompt_mask", "prompt_mask", "bool"),
            Output("labels", "labels", ids),
            Output("metadata_ids", "metadata_ids", ids, "row", m),
            Output("metadata_labels", "metadata_labels", ids, "row", m),
            Output("metadata_mask", "metadata_mask", "bool", "row", m),
        ]
    return found


def _of_sequence(program: Sequence, ids: str) -> list[Output]:
    found = []
    if program.value != Value.NONE:
        found.append(Output("values", "values_out", "float32"))
    if program.counts:
        found.append(Output("counts", "counts_out", "float32"))
    if program.mask == Mask.TOKENS:
        found.append(Output("labels", "labels", ids))
    if program.mask in (Mask.BERNOULLI, Mask.EXACT):
        found += [Output("mask", "mask", "bool"), Output("masked_values", "masked_values", "float32")]
    if program.mask == Mask.SPLIT:
        found += [
            Output("gen_ids", "gen_ids", ids, "generated"),
            Output("gen_values", "gen_values", "float32", "generated"),
            Output("gen_lengths", "gen_lengths", "int32", "row"),
        ]
    return found


def most_tokens(compiled: Compiled, stored: np.ndarray) -> np.ndarray:
    """int64 (n,). Tokens that rows of so many stored elements can have at most."""
    program = compiled.program
    if not isinstance(program, Sequence):
        return np.full(len(stored), program.length, np.int64)
    n_known = len(compiled.tables.known)
    genes = np.full(len(stored), n_known) if program.zeros else np.minimum(stored, n_known)
    genes = np.maximum(np.minimum(genes, program.keep), min(program.fill_to, n_known))
    ends = program.n_front + program.n_back + 2 * (program.depth != Depth.NONE)
    most: np.ndarray = np.minimum(genes.astype(np.int64) + ends, program.length)
    return most


def longest_row(compiled: Compiled, most_stored: int, n_codes: int) -> int:
    """Entries of the lists that a block needs for its row."""
    program = compiled.program
    known = len(compiled.tables.known)
    room = max(most_stored, int(program.length), n_codes, -(-compiled.n_features // 32), 1)
    if isinstance(program, Ranked):
        return max(room, known, sum(program.tasks))  # the draws of unexpressed genes
    if program.zeros or (isinstance(program, Sequence) and program.fill_to):
        return max(room, known + int(program.length))
    return room


def drafts_of(compiled: Compiled) -> int:
    """Ids of each row that are written before lengths are known; 0: none."""
    return int(compiled.program.length) if isinstance(compiled.program, Weighted) else 0


def shaped(
    output: Output, tensor: torch.Tensor, n_rows: int, widths: np.ndarray, packed: bool
) -> torch.Tensor:
    """A tensor as users get it; `widths` are those that the kernels found."""
    if output.per == "row":
        return tensor.view(n_rows, *output.shape)
    width = int(widths[1 if output.per == "generated" else 0])
    if packed:
        return tensor[: int(widths[2])]
    return tensor[: n_rows * width].view(n_rows, width)
