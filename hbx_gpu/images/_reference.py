"""The reference for image transforms: every step in NumPy and scipy, one tile at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hbx_gpu.images._draws import Drawn, draw
from hbx_gpu.images._transform import ImageTransform


def transform_tiles(
    transform: ImageTransform, tiles: Sequence[np.ndarray], cells: Sequence[int], epoch: int, *, seed: int = 0
) -> np.ndarray:
    """What :class:`~hbx_gpu.images._dali.ImagePipeline` gives for tiles (C, h, w) of present cells.

    Returns
    -------
    np.ndarray
        (n, C, H, W) of the transform's dtype.
    """
    out = []
    for tile, cell in zip(tiles, cells, strict=True):
        sizes = [np.array([size]) for size in tile.shape[1:]]
        out.append(transform_tile(transform, tile, draw(transform, seed, epoch, np.array([cell]), *sizes)))
    return np.stack(out)


def transform_tile(transform: ImageTransform, tile: np.ndarray, drawn: Drawn) -> np.ndarray:
    """One tile (C, h, w) through all steps, with what was drawn for it (arrays of one element)."""
    x = tile
    if transform.crop:
        x = crop(x, int(_only(drawn.top)), int(_only(drawn.left)), transform.crop)
    if drawn.vertical_flip is not None and _only(drawn.vertical_flip):
        x = x[:, ::-1]
    if drawn.horizontal_flip is not None and _only(drawn.horizontal_flip):
        x = x[:, :, ::-1]
    if drawn.rotation is not None:
        x = rotate(x, float(_only(drawn.rotation)), transform.fill, transform.interpolation == "nearest")
    if transform.resize:
        x = resize(x, transform.resize, transform.interpolation, transform.antialias)
    if drawn.brightness is not None and drawn.contrast is not None:
        x = brightness_contrast(x, _only(drawn.brightness), _only(drawn.contrast))
    if drawn.colors is not None:
        x = np.einsum("ij,jhw->ihw", drawn.colors[0].astype(np.float64), x)
    return finish(x, *transform.normalization(tile.dtype), transform.dtype)


def _only(values: np.ndarray | None) -> float:
    assert values is not None
    value: float
    (value,) = values
    return value


def crop(x: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """The window of `size` that begins at (top, left)."""
    return x[:, top : top + size[0], left : left + size[1]]


def rotate(x: np.ndarray, degrees: float, fill: float, nearest: bool) -> np.ndarray:
    """Turn counter-clockwise about the center; (0, 0) is the upper left, size stays."""
    from scipy.ndimage import affine_transform

    angle = np.deg2rad(degrees)
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    center = (np.array(x.shape[1:]) - 1) / 2
    offset = center - back @ center
    return np.stack(
        [
            affine_transform(
                channel.astype(np.float64),
                back,
                offset,
                order=0 if nearest else 1,
                mode="grid-constant",
                cval=fill,
            )
            for channel in x
        ]
    )


def _triangle(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.clip(1 - np.abs(x), 0, None)
    return result


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2 (Catmull-Rom)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


_FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos": (_lanczos, 3),
}


def resize_matrix(before: int, after: int, interpolation: str, antialias: bool) -> np.ndarray:
    """(after, before) weights of one axis; pixels beyond the border are those of the border."""
    ratio = before / after
    weights = np.zeros((after, before))
    for place in range(after):
        center = (place + 0.5) * ratio - 0.5
        if interpolation == "nearest":
            weights[place, int(np.floor(center + 0.5))] = 1
            continue
        kernel, radius = _FILTERS[interpolation]
        stretch = max(1.0, ratio) if antialias else 1.0
        taps = np.arange(np.ceil(center - radius * stretch), np.floor(center + radius * stretch) + 1)
        found = kernel((taps - center) / stretch)
        np.add.at(weights[place], np.clip(taps.astype(int), 0, before - 1), found / found.sum())
    return weights


def resize(x: np.ndarray, size: tuple[int, int], interpolation: str, antialias: bool) -> np.ndarray:
    """Resample both axes."""
    rows = resize_matrix(x.shape[1], size[0], interpolation, antialias)
    columns = resize_matrix(x.shape[2], size[1], interpolation, antialias)
    result: np.ndarray = rows @ x.astype(np.float64) @ columns.T
    return result


def brightness_contrast(x: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Multiply by `brightness`, and distances from each channel's mean by `contrast`."""
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
    result: np.ndarray = float(brightness) * (mean + float(contrast) * (x - mean))
    return result


def finish(x: np.ndarray, mean: Sequence[float], std: Sequence[float], dtype: str) -> np.ndarray:
    """Normalize in float32 and convert."""
    center, spread = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    normal = (x.astype(np.float32) - center) * (np.float32(1) / spread)
    if dtype == "uint8":
        return np.clip(np.floor(normal + 0.5), 0, 255).astype(np.uint8)
    with np.errstate(over="ignore"):
        return normal.astype(dtype)
