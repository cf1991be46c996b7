"""`ImageTransform`: the steps for a tile, their order and their bounds, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
DTYPES = ("float32", "float16", "uint8")

Size = tuple[int, int]
Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTransform:
    """Steps for image tiles (C, H, W), done in the order of the attributes; each is off unless given.

    Every step in front of `mean` works on stored values: 0..255 for uint8, and so on. Nothing is clipped
    between steps.

    Attributes
    ----------
    random_crop
        (height, width) of a window at a random place, every place equally likely. One number is a square.
    center_crop
        (height, width) of the window in the middle; where an odd number of pixels is left over, as
        torchvision has it. Not together with `random_crop`.
    vertical_flip, horizontal_flip
        Probability of turning a tile upside down, and of mirroring left and right.
    rotation
        Degrees: turned about its center by an angle from [-rotation, rotation], counter-clockwise if
        positive. The size stays; what comes from outside the tile, or the crop, is `fill`. Bilinear, or
        nearest if that is the `interpolation`.
    fill
        Stored value for pixels that a rotation brings in.
    resize
        (height, width) afterwards.
    interpolation
        ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
    antialias
        Widen the filter where a tile shrinks. Pixels beyond the border repeat it.
    brightness
        Values are multiplied by a factor from [1 - brightness, 1 + brightness], or from (low, high) if given.
    contrast
        Distances from each channel's own mean in the tile are multiplied by a factor, given likewise.
    saturation
        Distances from the luma 0.299 R + 0.587 G + 0.114 B are multiplied by a factor, given likewise. For
        three channels only.
    hue
        Colors are turned about the gray axis of RGB by a part of a full turn from [-hue, hue], at most 0.5,
        or from the (low, high) given. For three channels only.
    scale
        Divide by the largest value of the stored integer type (255, 65535), as torchvision's
        ``ToDtype(scale=True)``. Stored floats stay.
    mean, std
        Normalize: subtract `mean`, divide by `std`, one number for all channels or one each, in units behind
        `scale`.
    dtype
        ``"float32"``, ``"float16"`` (the nearest; of two equally near either), or ``"uint8"``: rounded,
        halves up, and clipped to 0..255.

    Raises
    ------
    ValueError, TypeError
        A value out of bounds, or steps that do not go together.
    """

    random_crop: int | Size | None = None
    center_crop: int | Size | None = None
    vertical_flip: float = 0.0
    horizontal_flip: float = 0.0
    rotation: float = 0.0
    fill: float = 0.0
    resize: Size | None = None
    interpolation: str = "bilinear"
    antialias: bool = True
    brightness: float | Range = 0.0
    contrast: float | Range = 0.0
    saturation: float | Range = 0.0
    hue: float | Range = 0.0
    scale: bool = False
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("random_crop", "center_crop"):
            put(name, _size(name, getattr(self, name), square=True))
        put("resize", _size("resize", self.resize, square=False))
        if self.random_crop and self.center_crop:
            raise ValueError(
                f"a tile is cropped once: random_crop={self.random_crop} and "
                f"center_crop={self.center_crop} are both given; leave one out"
            )
        for name in ("vertical_flip", "horizontal_flip"):
            put(name, _between(name, getattr(self, name), 0, 1, "a probability"))
        put("rotation", _between("rotation", self.rotation, 0, 180, "degrees to either side"))
        put("fill", _number("fill", self.fill))
        for name in ("brightness", "contrast", "saturation"):
            put(name, _factor(name, getattr(self, name)))
        put("hue", _hue(self.hue))
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _one_of("dtype", self.dtype, DTYPES)
        for name in ("mean", "std"):
            put(name, _channels(name, getattr(self, name)))
        self._check_normalization()

    def _check_normalization(self) -> None:
        if self.std is not None and not all(value > 0 for value in self.std):  # type: ignore[union-attr]
            raise ValueError(f"std must be positive for every channel, got {self.std}")
        lengths = {len(value) for value in (self.mean, self.std) if isinstance(value, tuple)} - {1}
        if len(lengths) > 1:
            raise ValueError(
                f"mean and std are for the same channels, but mean is {self.mean} and std is {self.std}; "
                "give as many of both, or one number for all channels"
            )
        if self.recolor and lengths - {3}:
            raise ValueError(
                "saturation and hue are for three channels (red, green, blue), but mean or std are given for "
                f"{max(lengths)}; give three, or one number for all channels"
            )
        if self.scale and self.dtype == "uint8":
            raise ValueError(
                'scale=True brings values into 0..1, which dtype="uint8" cannot hold; ask for "float32" or '
                '"float16", or leave scale out'
            )

    @property
    def crop(self) -> Size | None:
        """(height, width) after the crop; None without a crop."""
        size = self.random_crop or self.center_crop
        assert not isinstance(size, int)  # the constructor made it a pair
        return size

    @property
    def jitter(self) -> bool:
        """Whether brightness or contrast change."""
        return self.brightness != (1.0, 1.0) or self.contrast != (1.0, 1.0)

    @property
    def recolor(self) -> bool:
        """Whether channels are mixed: saturation or hue."""
        return self.saturation != (1.0, 1.0) or self.hue != (0.0, 0.0)

    @property
    def interpolates(self) -> bool:
        """Whether pixels are computed between crop and normalization, and not only moved."""
        return bool(self.rotation or self.resize or self.jitter or self.recolor)

    @property
    def n_channels(self) -> int | None:
        """Channels that tiles must have; None if any number will do."""
        for value in (self.mean, self.std):
            if isinstance(value, tuple) and len(value) > 1:
                return len(value)
        return 3 if self.recolor else None

    def normalization(self, stored: np.dtype) -> tuple[list[float], list[float]]:
        """`mean` and `std` in units of stored values, `scale` included.

        Parameters
        ----------
        stored
            Type of the tiles.
        """
        largest = float(np.iinfo(stored).max) if self.scale and stored.kind in "iu" else 1.0
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        assert isinstance(mean, tuple)  # the constructor made them so
        assert isinstance(std, tuple)
        return [value * largest for value in mean], [value * largest for value in std]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) that a tile (C, h, w) leaves with."""
        height, width = self.resize or self.crop or (int(shape[1]), int(shape[2]))
        return int(shape[0]), height, width

    def check_channels(self, channels: int) -> None:
        """Refuse tiles whose channels the steps are not for.

        Raises
        ------
        ValueError
            Says which steps, and for how many channels they are.
        """
        if self.recolor and channels != 3:
            raise ValueError(
                "saturation and hue are for three channels (red, green, blue), and these tiles have "
                f"{channels}; brightness and contrast work for any number"
            )
        wanted = self.n_channels
        if wanted is not None and wanted != channels:
            raise ValueError(
                f"mean or std are given for {wanted} channels, and these tiles have {channels}; give one "
                "number per channel, or one for all"
            )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _between(name: str, value: object, low: float, high: float, what: str) -> float:
    number = _number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} is {what} and must be in [{low}, {high}], got {value}")
    return number


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _size(name: str, value: object, *, square: bool) -> Size | None:
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not square:
            raise TypeError(
                f"{name} must be (height, width), got {value}: one number would leave the shape of the "
                "output to each tile, and a batch needs one shape"
            )
        value = (value, value)
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in pair):
        raise TypeError(f"{name} must be (height, width) in whole pixels, got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be at least one pixel high and wide, got {pair}")
    return int(pair[0]), int(pair[1])


def _range(name: str, value: object) -> Range | None:
    """(low, high) if that is what was given; None for one number."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    if len(value) != 2:
        raise TypeError(f"{name} must be a number or (low, high), got {value!r}")
    low, high = (_number(name, part) for part in value)
    if low > high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {tuple(value)}")
    return low, high


def _factor(name: str, value: object) -> Range:
    span = _range(name, value)
    if span is None:
        strength = _number(name, value)
        if strength < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        return max(0.0, 1.0 - strength), 1.0 + strength
    if span[0] < 0:
        raise ValueError(f"{name} multiplies, so its (low, high) must not be negative, got {span}")
    return span


def _hue(value: object) -> Range:
    span = _range("hue", value)
    if span is None:
        strength = _between("hue", value, 0, 0.5, "a part of a full turn")
        span = (-strength, strength) if strength else (0.0, 0.0)
    if span[0] < -0.5 or span[1] > 0.5:
        raise ValueError(f"hue is a part of a full turn and must be in [-0.5, 0.5], got {span}")
    return span


def _channels(name: str, value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (_number(name, value),)
    if not len(value):
        raise ValueError(f"{name} must have a number per channel, or be one number; got {value!r}")
    return tuple(_number(name, part) for part in value)
