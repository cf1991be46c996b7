"""What engines are given: rows on their way to tokens, and how a batch is handed out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._program import Mask, Sequence

PADDINGS = ("longest", "max_length", "packed")
IDS = ("int64", "int32")


@dataclass(frozen=True, slots=True)
class Options:
    """How a batch is handed out.

    Attributes
    ----------
    padding
        Rows as long as the ``"longest"``, as the recipe's ``"max_length"``, or end to end (``"packed"``).
    multiple
        Widths are rounded up to a multiple of this.
    ids_dtype
        Of ids and labels.
    """

    padding: str = "longest"
    multiple: int = 1
    ids_dtype: str = "int64"

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {self.padding!r}")
        if self.ids_dtype not in IDS:
            raise ValueError(f"ids_dtype must be one of {', '.join(map(repr, IDS))}, got {self.ids_dtype!r}")
        if self.multiple < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, got {self.multiple}")
        if self.padding == "packed" and self.multiple > 1:
            raise ValueError("pad_to_multiple_of is for padded rows: leave it out where padding is 'packed'")

    def width(self, lengths: np.ndarray, most: int) -> int:
        """Tokens of each row of a padded batch."""
        width = most if self.padding == "max_length" else int(lengths.max(initial=0))
        return -(-width // self.multiple) * self.multiple


@dataclass(frozen=True, slots=True)
class Cells:
    """Rows on their way to tokens.

    Attributes
    ----------
    offsets, columns, values
        CSR: int64 (n + 1,), integers (nnz,) and numbers (nnz,).
    front
        int64 (n, k) or (1, k). Special tokens before the genes.
    numbers
        int64 (n,). Row numbers of the dataset, which draws belong to.
    seed, epoch, batch
        What else draws belong to.
    where
        What holds the values, for messages.
    obs
        Further ids by name, int64 (n, ...).
    """

    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    front: np.ndarray
    numbers: np.ndarray
    seed: int
    epoch: int
    batch: int
    where: str
    obs: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Engine(Protocol):
    """Makes tokens of rows: the arrays of :func:`encode` but for ``attention_mask`` and obs columns."""

    def __call__(self, compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
        """Arrays by name; ``lengths`` among them."""


def check_options(compiled: Compiled, options: Options) -> None:
    """Refuse what a recipe's rows cannot be handed out as.

    Raises
    ------
    ValueError
        Rows of two sequences, packed.
    """
    program = compiled.program
    if options.padding == "packed" and isinstance(program, Sequence) and program.mask == Mask.SPLIT:
        raise ValueError("rows that a Split cuts in two cannot be packed: choose another padding")
