"""Programs as plain numbers, as kernels of the host and of devices take them."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from hbx_gpu.tokens._arithmetic import linspace32
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._program import Sequence


class I(IntEnum):  # noqa: E742
    """Places of whole numbers of a program."""

    ORDER = 0
    KEEP = 1
    CUT_RANDOM = 2
    RANK = 3
    SCALED = 4
    FILL = 5
    FILL_TO = 6
    VALUE = 7
    NORM = 8
    CURVE = 9
    SIDE = 10
    TORCH_EDGES = 11
    COUNTS = 12
    N_FRONT = 13
    N_BACK = 14
    DEPTH = 15
    DEPTH_FIRST = 16
    DEPTH_SECOND = 17
    DEPTH_DROP = 18
    PAD_ID = 19
    MASK = 20
    MASK_FRONT = 21
    MASK_SHORT = 22
    MASK_ID = 23
    REPLACE_FIRST = 24
    REPLACE_SPAN = 25
    MASKED_BELOW = 26
    REPLACED_BELOW = 27
    LENGTH = 28
    KIND = 29


class Kind(IntEnum):
    """Kinds of programs."""

    SEQUENCE = 0
    WEIGHTED = 1
    RANKED = 2
    PROMPT = 3


class F(IntEnum):
    """Places of fractions of a program."""

    RANK_TARGET = 0
    TARGET = 1
    CLIP = 2
    DEPTH_NUMBER = 3
    PAD_VALUE = 4
    MASK_VALUE = 5


def numbers_of(program: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """int64 and float64. A program as numbers, in the places of :class:`I` and :class:`F`."""
    whole = [
        program.order, program.keep, program.cut_random, program.rank, program.scaled, program.fill,
        program.fill_to, program.value, program.norm, program.curve, program.side, program.torch_edges,
        program.counts, program.n_front, program.n_back, program.depth, *program.depth_ids,
        program.depth_drop, program.pad_id, program.mask, program.mask_front, program.mask_short,
        program.mask_id, program.replace_first, program.replace_span, below(program.masked),
        below(program.replaced), program.length, Kind.SEQUENCE,
    ]  # fmt: skip
    fractions = [
        program.rank_target, program.target, program.clip, program.depth_number, program.pad_value,
        program.mask_value,
    ]  # fmt: skip
    assert len(whole) == len(I)
    assert len(fractions) == len(F)
    return np.array([int(number) for number in whole], np.int64), np.array(fractions, np.float64)


def below(share: float) -> int:
    """How many of the 2**53 numbers of [0, 1) are below a share."""
    return int(np.ceil(share * 2.0**53))


def quantiles_of(program: Sequence) -> np.ndarray:
    """float64 (bins - 1,). Where the edges of bins lie among sorted values, from 0 to 1."""
    if program.torch_edges:
        return linspace32(program.bins - 1).astype(np.float64)
    quantiles = np.arange(program.bins - 1) * (1.0 / (program.bins - 2))
    quantiles[-1] = 1.0
    return quantiles


def numbers_of_sampled(program: Weighted | Ranked | Prompt) -> tuple[np.ndarray, np.ndarray]:
    """int64 and float64. A program that samples genes, in the places that kernels/sentences.cu names."""
    whole, fractions = np.zeros(len(I), np.int64), np.zeros(len(F), np.float64)
    whole[I.LENGTH], whole[I.PAD_ID] = program.length, program.pad_id
    fractions[F.PAD_VALUE] = program.pad_value
    if isinstance(program, Weighted):
        whole[:4] = program.samples, program.cls, program.close, program.offset
        whole[I.KIND] = Kind.WEIGHTED
    elif isinstance(program, Ranked):
        whole[:5] = program.cls_column, *program.tasks, program.count_one_absent
        whole[I.KIND] = Kind.RANKED
    else:
        whole[:3] = program.prefix, program.value_vocabulary, program.predict
        fractions[:3] = program.thinned, program.min_umis, program.max_umis
        whole[I.KIND] = Kind.PROMPT
    return whole, fractions
