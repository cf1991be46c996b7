"""Random numbers that belong to a cell: a pure function of (seed, epoch, cell, step) and of nothing else.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011): the key is the seed, the counter is (cell, epoch, step). No state, so neither batches,
workers, threads nor order can change what a cell draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from hbx_gpu.images._recipe import ImageTransform, Range

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class Step(IntEnum):
    """Part of the counter: numbers never change, so that another step leaves the draws of these alone."""

    CROP = 0
    VERTICAL_FLIP = 1
    HORIZONTAL_FLIP = 2
    ROTATION = 3
    BRIGHTNESS = 4
    CONTRAST = 5
    SATURATION = 6
    HUE = 7


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    counter
        uint64 (4, ...), 32-bit words.
    key
        Two 32-bit words.

    Returns
    -------
    np.ndarray
        uint64 like `counter`, 32-bit words.
    """
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (right >> _HALF) ^ b ^ np.uint64(key_0), (left >> _HALF) ^ d ^ np.uint64(key_1)
        b, d = right & _LOW, left & _LOW
        key_0, key_1 = (key_0 + _WEYL[0]) & 0xFFFFFFFF, (key_1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d])


def uniform(seed: int, epoch: int, cells: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Two independent numbers for each cell and step.

    Parameters
    ----------
    seed
        0 .. 2**64 - 1.
    epoch
        0 .. 2**32 - 1.
    cells
        int64 (n,), row numbers, not negative.
    steps
        What they are for, k of them.

    Returns
    -------
    np.ndarray
        float64 (k, 2, n), uniform in [0, 1), multiples of 2**-53.

    Raises
    ------
    ValueError
        A number that is out of bounds.
    """
    cells = np.asarray(cells, np.int64)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be in 0 .. 2**32 - 1, got {epoch}")
    if len(cells) and cells.min() < 0:
        raise ValueError(f"cells must be row numbers of the dataset, got {cells.min()}")
    rows = cells.astype(np.uint64)
    counter = np.empty((4, len(steps), len(rows)), np.uint64)
    counter[0], counter[1] = rows & _LOW, rows >> _HALF
    counter[2], counter[3] = epoch, np.asarray(steps, np.uint64)[:, None]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).swapaxes(0, 1)
    high, low = words[:, 0::2] >> np.uint64(5), words[:, 1::2] >> np.uint64(6)  # 27 and 26 bits
    return (high * 2.0**26 + low) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Drawn:
    """What each of n tiles undergoes; None for steps that are off.

    Attributes
    ----------
    top, left
        int64 (n,), first row and column of the crop.
    vertical_flip, horizontal_flip
        bool (n,).
    rotation
        float32 (n,), degrees counter-clockwise.
    brightness, contrast
        float32 (n,), factors.
    colors
        float32 (n, 3, 3), what RGB vectors are multiplied by: saturation, then hue.
    """

    top: np.ndarray | None = None
    left: np.ndarray | None = None
    vertical_flip: np.ndarray | None = None
    horizontal_flip: np.ndarray | None = None
    rotation: np.ndarray | None = None
    brightness: np.ndarray | None = None
    contrast: np.ndarray | None = None
    colors: np.ndarray | None = None


def draw(
    transform: ImageTransform,
    seed: int,
    epoch: int,
    cells: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> Drawn:
    """Draw for n tiles.

    Parameters
    ----------
    transform
        The steps.
    seed, epoch, cells
        As for :func:`uniform`.
    heights, widths
        int64 (n,), of the tiles, no smaller than the crop.
    """

    steps = _steps(transform)
    # All at once: for few cells the cost is that of NumPy's calls.
    numbers = dict(zip(steps, uniform(seed, epoch, cells, steps), strict=True))

    def chance(step: Step, probability: float) -> np.ndarray | None:
        return numbers[step][0] < probability if probability else None

    def between(step: Step, span: Any) -> np.ndarray:
        low, high = span
        return (low + (high - low) * numbers[step][0]).astype(np.float32)

    top = left = None
    if transform.random_crop:
        top = _random_start(numbers[Step.CROP][0], heights, transform.crop, 0)
        left = _random_start(numbers[Step.CROP][1], widths, transform.crop, 1)
    elif transform.center_crop:
        top, left = (_middle(sizes, transform.crop, axis) for axis, sizes in enumerate((heights, widths)))
    brightness = contrast = colors = None
    if transform.jitter:
        brightness = between(Step.BRIGHTNESS, transform.brightness)
        contrast = between(Step.CONTRAST, transform.contrast)
    if transform.recolor:
        colors = color_matrices(
            between(Step.SATURATION, transform.saturation), between(Step.HUE, transform.hue)
        )
    turn: Range = (-transform.rotation, transform.rotation)
    return Drawn(
        top,
        left,
        chance(Step.VERTICAL_FLIP, transform.vertical_flip),
        chance(Step.HORIZONTAL_FLIP, transform.horizontal_flip),
        between(Step.ROTATION, turn) if transform.rotation else None,
        brightness,
        contrast,
        colors,
    )


def _steps(transform: ImageTransform) -> list[Step]:
    """Those that draw."""
    on = {
        Step.CROP: transform.random_crop,
        Step.VERTICAL_FLIP: transform.vertical_flip,
        Step.HORIZONTAL_FLIP: transform.horizontal_flip,
        Step.ROTATION: transform.rotation,
        Step.BRIGHTNESS: transform.jitter,
        Step.CONTRAST: transform.jitter,
        Step.SATURATION: transform.recolor,
        Step.HUE: transform.recolor,
    }
    return [step for step, wanted in on.items() if wanted]


def _random_start(place: np.ndarray, sizes: np.ndarray, crop: Any, axis: int) -> np.ndarray:
    return np.floor(place * (sizes - crop[axis] + 1)).astype(np.int64)


def _middle(sizes: np.ndarray, crop: Any, axis: int) -> np.ndarray:
    return np.rint((sizes - crop[axis]) / 2).astype(np.int64)  # halves to even, as torchvision rounds


def color_matrices(saturation: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """What RGB vectors are multiplied by to change their saturation, then their hue.

    Parameters
    ----------
    saturation
        (n,), factors of the distance from the luma of ITU-R BT.601.
    hue
        (n,), parts of a full turn about the grey axis; a third turns red into green.

    Returns
    -------
    np.ndarray
        float32 (n, 3, 3).
    """
    factor = np.asarray(saturation, np.float64)[:, None, None]
    luma = np.broadcast_to([0.299, 0.587, 0.114], (3, 3))
    saturate = factor * np.eye(3) + (1 - factor) * luma
    angle = 2 * np.pi * np.asarray(hue, np.float64)[:, None, None]
    # Rodrigues' formula for the axis (1, 1, 1) / sqrt(3).
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) / 3
    return (turn @ saturate).astype(np.float32)
