"""Draw the random numbers of a transform's steps for each tile, as a function of seed, epoch and cell."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from hbx_gpu._draws import uniform
from hbx_gpu.images._transform import ImageTransform, Range


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


@dataclass(frozen=True, slots=True)
class Drawn:
    """The random numbers drawn for n tiles; None for steps that are off.

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
        As for :func:`hbx_gpu._draws.uniform`.
    heights, widths
        int64 (n,). Heights and widths of the tiles, not smaller than the crop.
    """
    steps = _steps(transform)
    # All at once: for few cells the cost is that of NumPy's calls.
    numbers = dict(zip(steps, uniform(seed, epoch, cells, steps), strict=True))

    def chance(step: Step, probability: float) -> np.ndarray | None:
        return numbers[step][0] < probability if probability else None

    def between(step: Step, span: float | Range) -> np.ndarray:
        assert isinstance(span, tuple)  # the constructor of the transform made it a pair
        low, high = span
        result: np.ndarray = (low + (high - low) * numbers[step][0]).astype(np.float32)
        return result

    top = left = None
    if transform.crop and transform.random_crop:
        top = _random_start(numbers[Step.CROP][0], heights, transform.crop[0])
        left = _random_start(numbers[Step.CROP][1], widths, transform.crop[1])
    elif transform.crop:
        top, left = _middle(heights, transform.crop[0]), _middle(widths, transform.crop[1])
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
    """Return the steps that draw random numbers."""
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


def _random_start(place: np.ndarray, sizes: np.ndarray, crop: int) -> np.ndarray:
    result: np.ndarray = np.floor(place * (sizes - crop + 1)).astype(np.int64)
    return result


def _middle(sizes: np.ndarray, crop: int) -> np.ndarray:
    result: np.ndarray = np.rint((sizes - crop) / 2).astype(np.int64)  # halves to even, as torchvision rounds
    return result


def color_matrices(saturation: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Return the matrices by which RGB vectors are multiplied to change their saturation, then their hue.

    Parameters
    ----------
    saturation
        (n,), factors of the distance from the luma of ITU-R BT.601.
    hue
        (n,), parts of a full turn about the gray axis; a third turns red into green.

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
    result: np.ndarray = (turn @ saturate).astype(np.float32)
    return result
