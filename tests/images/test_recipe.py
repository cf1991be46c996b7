"""The recipe of image steps: what it accepts, what it says about the rest."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hbx_gpu.images._transform import ImageTransform


def test_defaults_change_nothing() -> None:
    transform = ImageTransform()
    assert transform.output_shape((4, 7, 9)) == (4, 7, 9)
    assert not transform.interpolates
    assert transform.n_channels is None
    assert transform.normalization(np.dtype(np.uint16)) == ([0.0], [1.0])


def test_values_take_the_form_that_equal_recipes_share() -> None:
    one = ImageTransform(random_crop=8, brightness=0.25, hue=0.1, mean=3, std=(2,))
    given: dict[str, Any] = {"random_crop": [np.int64(8), 8], "mean": np.array([3])}
    other = ImageTransform(brightness=(0.75, 1.25), hue=(-0.1, 0.1), std=2.0, **given)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert dataclasses.replace(one) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.random_crop = 9  # type: ignore[misc]


def test_output_shape() -> None:
    assert ImageTransform(center_crop=(3, 4)).output_shape((2, 9, 9)) == (2, 3, 4)
    assert ImageTransform(center_crop=(3, 4), resize=(6, 5)).output_shape((2, 9, 9)) == (2, 6, 5)


def test_factors_do_not_go_below_zero() -> None:
    assert ImageTransform(contrast=1.5).contrast == (0.0, 2.5)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_scale_is_part_of_the_normalization(dtype: str, largest: int) -> None:
    transform = ImageTransform(scale=True, mean=(0.5, 0.25), std=0.5)
    mean, std = transform.normalization(np.dtype(dtype))
    assert mean == [0.5 * largest, 0.25 * largest]
    assert std == [0.5 * largest]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"random_crop": 3, "center_crop": 3}, ValueError, "cropped once"),
        ({"random_crop": (3,)}, TypeError, r"random_crop must be \(height, width\)"),
        ({"random_crop": "3"}, TypeError, "whole pixels, got '3'"),
        ({"random_crop": (3.5, 2)}, TypeError, "whole pixels"),
        ({"center_crop": (0, 3)}, ValueError, "at least one pixel"),
        ({"center_crop": True}, TypeError, "whole pixels, got True"),
        ({"resize": 64}, TypeError, "one number would leave the shape"),
        (
            {"vertical_flip": 1.5},
            ValueError,
            r"vertical_flip is a probability and must be in \[0, 1\], got 1.5",
        ),
        ({"horizontal_flip": True}, TypeError, "must be a number"),
        ({"horizontal_flip": "0.5"}, TypeError, "horizontal_flip must be a number, got '0.5'"),
        ({"rotation": -3}, ValueError, "rotation is degrees"),
        ({"fill": float("nan")}, ValueError, "fill must be finite"),
        ({"interpolation": "linear"}, ValueError, "one of 'nearest', 'bilinear'"),
        ({"dtype": "bfloat16"}, ValueError, "one of 'float32', 'float16', 'uint8', got 'bfloat16'"),
        ({"brightness": -0.1}, ValueError, "brightness must not be negative"),
        ({"brightness": (1.2, 0.8)}, ValueError, "low <= high"),
        ({"contrast": (-0.5, 1)}, ValueError, "contrast multiplies"),
        ({"contrast": (1, 1, 1)}, TypeError, r"number or \(low, high\)"),
        ({"hue": 0.6}, ValueError, "part of a full turn"),
        ({"hue": (-0.6, 0)}, ValueError, "part of a full turn"),
        ({"mean": ()}, ValueError, "a number per channel"),
        ({"mean": (1, 2), "std": (1, 2, 3)}, ValueError, "give as many of both"),
        ({"std": (1, 0, 1)}, ValueError, "std must be positive"),
        ({"saturation": 0.5, "mean": (1, 2)}, ValueError, "are given for 2; give three"),
        ({"scale": True, "dtype": "uint8"}, ValueError, 'which dtype="uint8" cannot hold'),
    ],
)
def test_bad_values(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ImageTransform(**options)


def test_channels_that_steps_are_not_for() -> None:
    with pytest.raises(ValueError, match="these tiles have 4; brightness and contrast work for any"):
        ImageTransform(hue=0.1).check_channels(4)
    with pytest.raises(ValueError, match="given for 2 channels, and these tiles have 3"):
        ImageTransform(mean=(1, 2)).check_channels(3)
    ImageTransform(mean=1, std=(1, 2, 3), saturation=0.2).check_channels(3)


def test_import_pulls_in_neither_dali_nor_torch() -> None:
    code = "import sys, hbx_gpu.images; print({'torch', 'nvidia.dali', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
