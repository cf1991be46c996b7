"""DALI graphs of image tiles, and pipelines around them; the one module of this package that imports DALI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from nvidia.dali import fn as dali_fn
from nvidia.dali import types as dali_types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from hbx_gpu.images._draws import Drawn
from hbx_gpu.images._transform import ImageTransform

if TYPE_CHECKING:
    import torch

# DALI makes their names at import; its stubs do not have them all.
fn: Any = dali_fn
types: Any = dali_types

_INTERPOLATION = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
_DTYPES = {
    "float32": types.FLOAT,
    "float16": types.FLOAT16,
    "uint8": types.UINT8,
    "uint16": types.UINT16,
}
_COLORS = {"rgb": types.RGB, "gray": types.GRAY, "any": types.ANY_DATA}


@dataclass(frozen=True, slots=True)
class Decoding:
    """How encoded images are decoded.

    Attributes
    ----------
    colors
        ``"rgb"``, ``"gray"``, or ``"any"``: channels as stored.
    dtype
        ``"uint8"`` or ``"uint16"``.
    """

    colors: str
    dtype: str


def _source(name: str, **options: object) -> DataNode:
    node: DataNode = fn.external_source(name=name, batch=True, no_copy=True, **options)
    return node


def peek_graph() -> DataNode:
    """Shapes (h, w, C) of encoded images, from their headers."""
    node: DataNode = fn.peek_image_shape(
        _source("tiles"), image_type=types.ANY_DATA, adjust_orientation=False
    )
    return node


def _decoded(decoding: Decoding, gpu: bool) -> DataNode:
    node: DataNode = fn.decoders.image(
        _source("tiles"),
        device="mixed" if gpu else "cpu",
        output_type=_COLORS[decoding.colors],
        dtype=_DTYPES[decoding.dtype],
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    return node


def decode_graph(decoding: Decoding, *, gpu: bool = False) -> DataNode:
    """Return the node of decoded images (C, h, w)."""
    node: DataNode = fn.transpose(_decoded(decoding, gpu), perm=[2, 0, 1], output_layout="CHW")
    return node


def transform_graph(
    transform: ImageTransform,
    stored: np.dtype,
    *,
    gpu: bool = False,
    decoding: Decoding | None = None,
) -> DataNode:
    """Return the node of transformed tiles (C, H, W), of the transform's dtype; one sample is one tile.

    Random numbers come in through the inputs that :func:`arguments` names.

    Parameters
    ----------
    transform
        The steps.
    stored
        Type of the tiles, or of the decoded images.
    gpu
        Whether it runs on a GPU.
    decoding
        How the input `tiles` is decoded; None: it holds tiles (C, h, w).
    """
    if decoding is not None:
        tiles, layout = _decoded(decoding, gpu), "HWC"
    else:
        tiles, layout = _source("tiles", device="gpu" if gpu else "cpu", layout="CHW"), "CHW"
    if not transform.interpolates:
        # Cropping and mirroring are part of the last operator. It cannot turn upside down, so that comes
        # first, and `arguments` counts the crop's rows from below.
        if transform.vertical_flip:
            tiles = fn.flip(tiles, horizontal=0, vertical=_source("vertical_flip"))
        mirror = {"mirror": _source("horizontal_flip")} if transform.horizontal_flip else {}
        return _finish(tiles, transform, stored, **mirror, **_window(transform))
    if transform.crop:
        tiles = fn.crop(tiles, **_window(transform))
    if transform.vertical_flip or transform.horizontal_flip:
        flips = {
            axis: _source(f"{axis}_flip") if getattr(transform, f"{axis}_flip") else 0
            for axis in ("vertical", "horizontal")
        }
        tiles = fn.flip(tiles, **flips)
    if layout == "CHW" and (transform.rotation or transform.recolor):
        tiles, layout = fn.transpose(tiles, perm=[1, 2, 0], output_layout="HWC"), "HWC"
    tiles = _interpolated(tiles, transform, stored)
    return _finish(_colored(tiles, transform, layout, gpu), transform, stored)


def _window(transform: ImageTransform) -> dict[str, object]:
    if not transform.crop:
        return {}
    return {
        "crop": [float(size) for size in transform.crop],
        "crop_pos_y": _source("crop_y"),
        "crop_pos_x": _source("crop_x"),
        "rounding": "round",
    }


def _interpolated(tiles: DataNode, transform: ImageTransform, stored: np.dtype) -> DataNode:
    kind = _INTERPOLATION[transform.interpolation]
    if transform.rotation:
        if stored == np.uint16:  # which DALI does not rotate
            tiles = fn.cast(tiles, dtype=types.FLOAT)
        tiles = fn.rotate(
            tiles,
            angle=_source("rotation"),
            keep_size=True,
            fill_value=transform.fill,
            interp_type=kind if transform.interpolation == "nearest" else types.INTERP_LINEAR,
            dtype=types.FLOAT,
        )
    if transform.resize:
        tiles = fn.resize(
            tiles,
            size=[float(size) for size in transform.resize],
            interp_type=kind,
            antialias=transform.antialias,
            dtype=types.FLOAT,
        )
    return tiles


def _colored(tiles: DataNode, transform: ImageTransform, layout: str, gpu: bool) -> DataNode:
    if transform.jitter:
        gain, offset = _source("gain"), _source("offset")
        if gpu:
            gain, offset = gain.gpu(), offset.gpu()
        axes = [layout.index("H"), layout.index("W")]
        tiles = tiles * gain + fn.reductions.mean(tiles, axes=axes, keep_dims=True) * offset
    if transform.recolor:
        tiles = fn.coord_transform(tiles, M=_source("colors"), dtype=types.FLOAT)
    return tiles


def _finish(tiles: DataNode, transform: ImageTransform, stored: np.dtype, **options: object) -> DataNode:
    mean, std = transform.normalization(stored)
    node: DataNode = fn.crop_mirror_normalize(
        tiles, mean=mean, std=std, dtype=_DTYPES[transform.dtype], output_layout="CHW", **options
    )
    return node


def arguments(
    transform: ImageTransform, drawn: Drawn, heights: np.ndarray, widths: np.ndarray
) -> dict[str, object]:
    """Return what is fed to the inputs of :func:`transform_graph` besides the tiles, one entry per tile.

    Parameters
    ----------
    transform
        The steps.
    drawn
        Random numbers drawn for these tiles.
    heights, widths
        int64 (m,). Heights and widths of the tiles.
    """
    found: dict[str, object] = {}
    if drawn.top is not None and drawn.left is not None and transform.crop:
        top, room = drawn.top, heights - transform.crop[0]
        if not transform.interpolates and drawn.vertical_flip is not None:
            top = np.where(drawn.vertical_flip, room - top, top)
        found["crop_y"] = _relative(top, room)
        found["crop_x"] = _relative(drawn.left, widths - transform.crop[1])
    for name in ("vertical_flip", "horizontal_flip"):
        flips = getattr(drawn, name)
        if flips is not None:
            found[name] = flips.astype(np.int32)
    if drawn.rotation is not None:
        found["rotation"] = drawn.rotation
    if drawn.brightness is not None and drawn.contrast is not None:
        gain = drawn.brightness * drawn.contrast
        found["gain"] = gain[:, None, None, None]
        found["offset"] = (drawn.brightness - gain)[:, None, None, None]
    if drawn.colors is not None:
        found["colors"] = drawn.colors
    return found


def _relative(start: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Starts as parts of the room; DALI rounds back to whole pixels, exactly below 2**22 of them."""
    result: np.ndarray = (start / np.maximum(room, 1)).astype(np.float32)
    return result


class Output(Protocol):
    """What a run returns: a list of tensors of DALI."""

    def at(self, position: int, /) -> np.ndarray:
        """One sample, on the host."""

    def as_array(self) -> np.ndarray:
        """All samples, on the host."""

    def as_tensor(self) -> Capsule:
        """All samples, as DLPack takes them."""


class Capsule(Protocol):
    """A tensor that other libraries take over through DLPack."""

    def __dlpack__(self) -> object: ...


def build(
    graph: Callable[[], DataNode], device_id: int | None, num_threads: int, *, largest: int
) -> Pipeline:
    """A pipeline with this graph, ready to be fed with batches of up to `largest` samples."""
    pipe = Pipeline(
        batch_size=largest,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        seed=0,  # has no effect, because there are no random operators
    )
    with pipe:
        pipe.set_outputs(graph())
    pipe.build()
    return pipe


def run(pipe: Pipeline, feeds: Mapping[str, object], *, stream: torch.cuda.Stream | None = None) -> Output:
    """Feed a batch, run it, and return the one output.

    Parameters
    ----------
    pipe
        From :func:`build`; used by one thread.
    feeds
        By input: an array or a DLPack capsule whose first axis are samples, or a list of arrays.
    stream
        torch stream that the output is ordered into; None: waits until the output is there.
    """
    for name, data in feeds.items():
        pipe.feed_input(name, data)
    pipe.schedule_run()
    output: Output
    (output,) = pipe.share_outputs() if stream is None else pipe.share_outputs(cuda_stream=stream)
    pipe.release_outputs()
    return output
