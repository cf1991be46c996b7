"""How many cells are compared before files count as the same, or as different."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from hbx_gpu.atlas._ingest.duplicates import _MOST_COUNTS, _are_mostly_same, _Values
from hbx_gpu.atlas._model.spaces import get_space


class Answers(_Values):
    """Pairs of cells that are known to be the same, or not, or to say nothing."""

    def __init__(self, answers: list[bool | None]) -> None:
        super().__init__(Path(), get_space("gene_expression"))
        self.answers, self.asked = answers, 0

    def same(self, one: Mapping[str, object], _other: Mapping[str, object]) -> bool | None:
        self.asked += 1
        place = one["place"]
        assert isinstance(place, int)
        return self.answers[place]


def decided(read: Answers) -> bool:
    return _are_mostly_same(read, [({"place": k}, {}) for k in range(len(read.answers))])


def test_pairs_are_looked_at_as_long_as_they_may_be_the_same() -> None:
    rng = random.Random(0)
    for _ in range(3_000):
        share = rng.random()
        weights = (share, share / 3, 0.2)
        answers = rng.choices((True, False, None), weights, k=rng.randint(0, 20))
        said = [answer for answer in answers if answer is not None]
        expected = bool(said) and sum(said) >= _MOST_COUNTS * len(said)
        assert decided(Answers(answers)) == expected, answers


def test_different_cells_are_told_apart_by_a_few() -> None:
    read = Answers([False] * 64)
    assert not decided(read)
    assert read.asked == 13
