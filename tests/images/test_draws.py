"""What is drawn for a cell: known answers, independence of everything but the cell, and uniformity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._draws import philox, uniform
from hbx_gpu.images._draws import Step, color_matrices, draw
from hbx_gpu.images._transform import ImageTransform

EVERYTHING = ImageTransform(
    random_crop=(5, 7), vertical_flip=0.5, horizontal_flip=0.3, rotation=20, brightness=0.2, contrast=0.3,
    saturation=0.4, hue=0.1,
)  # fmt: skip
FIELDS = (
    "top", "left", "vertical_flip", "horizontal_flip", "rotation", "brightness", "contrast", "colors"
)  # fmt: skip


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_answers_of_random123(counter: str, key: str, expected: str) -> None:
    """Lines "philox4x32 10" of tests/kat_vectors in the authors' Random123 library."""
    words = np.array([[int(word, 16)] for word in counter.split()], np.uint64)
    first, second = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox(words, (first, second))[:, 0]] == expected.split()


def test_numbers_stay_what_they_are() -> None:
    """Runs of last year must be repeatable: a change here is a change of everybody's epochs."""
    found = uniform(7, 3, np.array([0, 1, 2**40]), [Step.ROTATION])[0]
    words = philox(np.array([[0, 1, 0], [0, 0, 256], [3, 3, 3], [3, 3, 3]], np.uint64), (7, 0)).astype(object)
    assert found[0].tolist() == [
        ((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in zip(*words[:2], strict=True)
    ]
    assert found[1].tolist() == [
        ((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in zip(*words[2:], strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    cells=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=12),
    data=st.data(),
)
def test_neither_order_nor_batches_matter(
    seed: int, epoch: int, cells: list[int], data: st.DataObject
) -> None:
    rows = np.array(cells)
    heights, widths = rows % 40 + 5, rows % 30 + 7
    whole = draw(EVERYTHING, seed, epoch, rows, heights, widths)
    order = np.array(data.draw(st.permutations(range(len(cells)))))
    cut = data.draw(st.integers(0, len(cells)))
    parts = [
        draw(EVERYTHING, seed, epoch, rows[part], heights[part], widths[part])
        for part in (order[:cut], order[cut:])
    ]
    for name in FIELDS:
        pieces = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(pieces, getattr(whole, name)[order])


def test_seed_epoch_cell_and_step_all_matter() -> None:
    cells = np.arange(100)
    base = uniform(1, 2, cells, [3])[0]
    others = [
        uniform(2, 2, cells, [3])[0],
        uniform(1 + 2**32, 2, cells, [3])[0],
        uniform(1, 3, cells, [3])[0],
        uniform(1, 2, cells + 100, [3])[0],
        uniform(1, 2, cells + 2**32, [3])[0],
        uniform(1, 2, cells, [9, 4])[1],
    ]
    for other in others:
        assert not (base == other).any()
    assert not (base[0] == base[1]).any()


def test_another_step_leaves_the_draws_of_the_others_alone() -> None:
    cells, size = np.arange(50), np.full(50, 30)
    alone: Any = draw(ImageTransform(random_crop=(5, 7)), 1, 2, cells, size, size)
    together: Any = draw(EVERYTHING, 1, 2, cells, size, size)
    assert np.array_equal(alone.top, together.top)
    assert np.array_equal(alone.left, together.left)
    assert alone.rotation is None


def test_numbers_are_uniform_and_uncorrelated() -> None:
    cells = np.arange(100_000)
    found = np.concatenate([uniform(0, epoch, cells, [0, 1]).reshape(4, -1) for epoch in (0, 1)])
    assert found.min() >= 0
    assert found.max() < 1
    for numbers in found:
        counts = np.bincount((numbers * 64).astype(int), minlength=64)
        expected = len(cells) / 64
        # 63 degrees of freedom: mean 63, standard deviation 11.2; 120 is five of them away.
        assert ((counts - expected) ** 2 / expected).sum() < 120
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / np.sqrt(len(cells))
    correlations = np.corrcoef(found) - np.eye(len(found))
    assert np.abs(correlations).max() < 5 / np.sqrt(len(cells))


def test_every_place_of_a_crop_is_equally_likely_and_inside() -> None:
    cells = np.arange(40_000)
    size = np.full(len(cells), 12)
    drawn: Any = draw(ImageTransform(random_crop=(9, 12)), 3, 0, cells, size, size)
    assert np.array_equal(np.unique(drawn.top), [0, 1, 2, 3])
    assert abs(np.bincount(drawn.top) - 10_000).max() < 5 * np.sqrt(7_500)
    assert not drawn.left.any()


def test_spans_of_what_is_drawn() -> None:
    cells = np.arange(20_000)
    size = np.full(len(cells), 20)
    drawn: Any = draw(EVERYTHING, 0, 0, cells, size, size)
    assert abs(drawn.vertical_flip.mean() - 0.5) < 0.02
    assert abs(drawn.horizontal_flip.mean() - 0.3) < 0.02
    for values, low, high in [
        (drawn.rotation, -20, 20),
        (drawn.brightness, 0.8, 1.2),
        (drawn.contrast, 0.7, 1.3),
    ]:
        assert low <= values.min() < low + (high - low) / 100
        assert high - (high - low) / 100 < values.max() <= high


def test_certain_and_impossible_flips() -> None:
    cells, size = np.arange(1000), np.full(1000, 9)
    drawn: Any = draw(ImageTransform(vertical_flip=1), 0, 0, cells, size, size)
    assert drawn.vertical_flip.all()
    assert drawn.horizontal_flip is None


def test_the_middle_is_where_torchvision_has_it() -> None:
    sizes = np.array([5, 6, 7, 8, 9])
    drawn: Any = draw(ImageTransform(center_crop=(4, 4)), 0, 0, np.arange(5), sizes, sizes)
    assert drawn.top.tolist() == [round((size - 4) / 2.0) for size in sizes.tolist()]


def test_colors() -> None:
    identity, gray, turned = color_matrices(np.array([1, 0, 1]), np.array([0, 0, 1 / 3]))
    assert np.allclose(identity, np.eye(3), atol=1e-7)
    assert np.allclose(gray, np.tile([0.299, 0.587, 0.114], (3, 1)), atol=1e-7)
    assert np.allclose(turned @ [1, 0, 0], [0, 1, 0], atol=1e-6)  # red to green
    assert np.allclose(turned @ [1, 1, 1], 1, atol=1e-6)


@pytest.mark.parametrize(
    ("seed", "epoch", "cell", "words"),
    [
        (-1, 0, 0, "seed must be"),
        (2**64, 0, 0, "seed must be"),
        (0, 2**32, 0, "epoch must be"),
        (0, 0, -5, "got -5"),
    ],
)
def test_numbers_out_of_bounds(seed: int, epoch: int, cell: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        uniform(seed, epoch, np.array([cell]), [0])
