"""Recipes lowered to numbers: what every engine carries out, without names, dicts or choices left to make."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np


class Norm(IntEnum):
    """How a count x becomes a value. T: the cell's total; T_v: that of known genes; N: the target."""

    COUNT = 0
    """float32(x)"""
    F64_DIV = 1
    """x / T * N in float64"""
    F64_RECIP = 2
    """x * (1 / T) * N in float64"""
    F32_RECIP = 3
    """x * (1 / T) * N in float32"""
    F32_DIV = 4
    """x / T_v * N in float32"""
    F32_EPS = 5
    """N * x / (T + 1e-6) in float32"""
    F32_FACTOR = 6
    """x * (N / T) in float32"""
    F64_KNOWN = 7
    """x / T_v * N in float64"""
    F32_KNOWN_EPS = 8
    """x / (T_v + 1e-9) * N in float32"""
    F32_KEPT = 9
    """x / (sum of the genes that are kept) * N in float32"""
    F32_TIMES = 10
    """x * N / T in float32"""


class Curve(IntEnum):
    """What is done to the scaled value."""

    NONE = 0
    LOG1P = 1
    LOG2P1 = 2
    """log2(1 + x), 1 + x rounded to float32"""


class Order(IntEnum):
    """Of genes in a row."""

    COLUMN = 0
    ID = 1
    VALUE = 2
    RANDOM = 3


class Fill(IntEnum):
    """Unexpressed genes after the expressed ones."""

    NONE = 0
    RANDOM = 1
    COLUMN = 2


class Value(IntEnum):
    """What stands in ``values``."""

    NONE = 0
    SCALED = 1
    BINS = 2
    KEPT_BINS = 3
    """Bins over the genes that are kept."""


class Side(IntEnum):
    """The bin of a value that equals several edges."""

    BOTH = 0
    ONE = 1
    LEFT = 2


class Mask(IntEnum):
    """What is hidden."""

    NONE = 0
    TOKENS = 1
    BERNOULLI = 2
    EXACT = 3
    SPLIT = 4


class Depth(IntEnum):
    """scFoundation's first depth token, from the total T_v and a number a."""

    NONE = 0
    CONSTANT = 1
    ADDED = 2
    TIMES = 3


class Program(Protocol):
    """What every lowered recipe has."""

    @property
    def length(self) -> int:
        """Most tokens of a row."""

    @property
    def zeros(self) -> bool:
        """Whether genes without a count take part."""

    @property
    def pad_id(self) -> int:
        """What fills ids up."""

    @property
    def pad_value(self) -> float:
        """What fills values up."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Genes in some order, cut, framed and masked: rank values, bins and expressed genes.

    Attributes
    ----------
    rank, rank_target
        What orders genes where `order` is VALUE: this value divided by the gene's scale.
    scaled
        Whether the gene's scale takes part.
    order, keep, cut_random
        Of n genes at most `keep` stay: the first in this order, or random ones in random order.
    fill, fill_to
        Unexpressed genes up to `fill_to` genes.
    zeros
        Every known gene is in every row, expressed or not.
    value, norm, target, curve, clip
        What stands in ``values``; clip is infinite where there is none.
    bins, side, torch_edges
        Of quantile bins.
    counts
        Whether ``counts`` is made.
    n_front, n_back
        Special tokens before and after the genes.
    front_values, back_values
        float32. Their values.
    depth, depth_number, depth_ids, depth_drop
        scFoundation's two tokens at the end.
    pad_id, pad_value
        What fills rows up.
    mask, ratios, mask_value, mask_front, mask_short
        What is hidden, with which probabilities (float64), what hidden values become, whether front tokens
        can be, and whether the last genes cannot.
    mask_id, masked, replaced, replace_first, replace_span, protect
        Of masked ids: `masked` and `masked + replaced` are upper ends of intervals of [0, 1).
    length
        Most tokens of a row.
    """

    length: int
    order: Order = Order.COLUMN
    keep: int = 0
    cut_random: bool = False
    rank: Norm = Norm.COUNT
    rank_target: float = 1.0
    scaled: bool = False
    fill: Fill = Fill.NONE
    fill_to: int = 0
    zeros: bool = False
    value: Value = Value.NONE
    norm: Norm = Norm.COUNT
    target: float = 1.0
    curve: Curve = Curve.NONE
    clip: float = float("inf")
    bins: int = 51
    side: Side = Side.ONE
    torch_edges: bool = False
    counts: bool = False
    front_values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    back_values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    depth: Depth = Depth.NONE
    depth_number: float = 0.0
    depth_ids: tuple[int, int] = (0, 0)
    depth_drop: bool = False
    pad_id: int = 0
    pad_value: float = 0.0
    mask: Mask = Mask.NONE
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float64))
    mask_value: float = -1.0
    mask_front: bool = False
    mask_short: bool = False
    mask_id: int = 0
    masked: float = 0.8
    replaced: float = 0.9
    replace_first: int = 0
    replace_span: int = 1
    protect: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def n_front(self) -> int:
        """Tokens before the genes."""
        return len(self.front_values)

    @property
    def n_back(self) -> int:
        """Tokens after the genes, depth tokens left out."""
        return len(self.back_values)


@dataclass(frozen=True, slots=True)
class Tables:
    """What is known of each column of a dataset.

    Attributes
    ----------
    column
        int32, (n_features,). The column that a column's counts go to; -1: its gene is not in the vocabulary.
    token
        int32, (n_features,). Token id by column, -1 where `column` is not the column itself.
    scale
        float64, (n_features,). What values are divided by or, for reciprocal arithmetics, multiplied by; 1
        where recipes have none.
    index
        int32, (n_features,). Number of the column in draws: its global column.
    known
        int32, ascending. Columns with a token.
    """

    column: np.ndarray
    token: np.ndarray
    scale: np.ndarray
    index: np.ndarray
    known: np.ndarray
