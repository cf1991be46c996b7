"""Encoded images (JPEG, PNG, TIFF) to arrays, and which of them cannot be decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._devices import cores, require_dali
from hbx_gpu.errors import CorruptDataError, HbxError, UnsupportedError
from hbx_gpu.images._encoded import ImageHeader, read_header
from hbx_gpu.images._tiles import collect

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline

    from hbx_gpu.images._graph import Decoding, Output

COLORS = ("rgb", "gray", "any")
# Samples that every pipeline has room for.
_FEW = 1024


class _Mine(threading.local):
    """Pipelines of the calling thread."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Pipeline] = {}


class Pipelines:
    """DALI pipelines of each thread that asks, made once and gone with the thread."""

    def __init__(self, device_id: int | None, num_threads: int) -> None:
        self.device_id, self.num_threads = device_id, num_threads
        self._mine = _Mine()

    def get(self, key: Hashable, graph: Callable[[], DataNode], samples: int) -> Pipeline:
        """The calling thread's pipeline for `key`, for a batch of so many; `graph` defines it."""
        from hbx_gpu.images._graph import build

        known = self._mine.known
        pipe = known.get(key)
        if pipe is None or pipe.max_batch_size < samples:
            # DALI keeps some hundred bytes per operator for each sample that may come.
            largest = max(_FEW, 1 << (samples - 1).bit_length())
            pipe = known[key] = build(graph, self.device_id, self.num_threads, largest=largest)
        return pipe

    def drop(self, key: Hashable) -> None:
        """Forget the calling thread's pipeline for `key`: an operator failed in it."""
        self._mine.known.pop(key, None)


class Decoder:
    """Looks into encoded images and decodes them, on the CPU.

    Parameters
    ----------
    colors
        ``"rgb"``, ``"gray"`` or ``"any"``.
    num_threads
        DALI's, for every calling thread.
    """

    def __init__(self, colors: str, num_threads: int) -> None:
        if colors not in COLORS:
            raise ValueError(f"channels must be one of {', '.join(map(repr, COLORS))}, got {colors!r}")
        require_dali("image tiles go through DALI")
        self.colors = colors
        self._pipelines = Pipelines(None, num_threads)

    def look(self, images: list[np.ndarray], rows: np.ndarray) -> tuple[list[Decoding], np.ndarray]:
        """How to decode each image, and the shapes (C, h, w) that come out: int64 (m, 3).

        Parameters
        ----------
        images
            uint8, 1-D.
        rows
            Their cell rows.

        Raises
        ------
        CorruptDataError
            One of them is not an image; the message names its cell row.
        UnsupportedError
            One of them would not be decoded correctly.
        """
        headers = [self._header(image, row) for image, row in zip(images, rows, strict=True)]
        try:
            shapes = self._peek(images)
        except RuntimeError:
            shapes = np.concatenate([self._peek_one(*pair) for pair in zip(images, rows, strict=True)])
        found = [
            self._decoding(header, int(channels), row)
            for header, channels, row in zip(headers, shapes[:, 2], rows, strict=True)
        ]
        fixed = {"rgb": 3, "gray": 1}
        shapes = shapes[:, [2, 0, 1]]
        shapes[:, 0] = [
            fixed.get(decoding.colors, n) for decoding, n in zip(found, shapes[:, 0], strict=True)
        ]
        return found, shapes

    def decode(self, images: list[np.ndarray], rows: np.ndarray, decoding: Decoding) -> list[np.ndarray]:
        """Decode images to arrays (C, h, w).

        Raises
        ------
        CorruptDataError
            An image cannot be decoded; the message names its cell row.
        """
        try:
            output = self._run(decoding, images)
        except RuntimeError:
            self.blame(images, rows, [decoding] * len(images))
            raise
        return [np.array(output.at(position)) for position in range(len(images))]

    def blame(self, images: list[np.ndarray], rows: np.ndarray, decodings: Sequence[Decoding]) -> None:
        """Decode each image for itself; raise for the first that cannot be, if there is one.

        Raises
        ------
        CorruptDataError
            Names the cell row.
        """
        for image, row, decoding in zip(images, rows, decodings, strict=True):
            try:
                self._run(decoding, [image])
            except RuntimeError as error:
                raise CorruptDataError(
                    f"cell row {row}: its {len(image):,} bytes cannot be decoded as an image "
                    f"({reason(error)}); they are damaged or cut off, or of a kind that DALI does not "
                    "decode. Mend or leave out this cell"
                ) from None

    def _run(self, decoding: Decoding, images: list[np.ndarray]) -> Output:
        from hbx_gpu.images._graph import decode_graph, run

        pipe = self._pipelines.get(decoding, lambda: decode_graph(decoding), len(images))
        try:
            return run(pipe, {"tiles": images})
        except RuntimeError:
            self._pipelines.drop(decoding)
            raise

    def _peek(self, images: list[np.ndarray]) -> np.ndarray:
        from hbx_gpu.images._graph import peek_graph, run

        pipe = self._pipelines.get("peek", peek_graph, len(images))
        try:
            return np.array(run(pipe, {"tiles": images}).as_array(), np.int64).reshape(-1, 3)
        except RuntimeError:
            self._pipelines.drop("peek")
            raise

    def _peek_one(self, image: np.ndarray, row: int) -> np.ndarray:
        try:
            return self._peek([image])
        except RuntimeError as error:
            raise CorruptDataError(
                f"cell row {row}: its {len(image):,} bytes are not an image that DALI can decode "
                f"({reason(error)}): "
                "it decodes JPEG, PNG, TIFF, BMP, PNM, WebP and JPEG 2000. Mend or leave out this cell"
            ) from None

    def _header(self, image: np.ndarray, row: int) -> ImageHeader:
        try:
            header = read_header(image)
        except HbxError as error:
            raise type(error)(f"cell row {row}: {error}") from None
        if header.mixed and self.colors != "any":
            raise UnsupportedError(
                f"cell row {row}: its TIFF has several channels that are not colors, which decoding as "
                f'"{self.colors}" would drop; decode with "any", which keeps them all'
            )
        return header

    def _decoding(self, header: ImageHeader, channels: int, row: int) -> Decoding:
        from hbx_gpu.images._graph import Decoding

        colors = self.colors
        if colors == "any":
            # DALI writes outside its memory for gray JPEGs that are asked for "as stored"; gray and RGB
            # are what is stored, for one and three channels.
            colors = {1: "gray", 3: "rgb"}.get(channels, "any")
        if colors == "any" and header.kind not in ("png", "tiff"):
            raise UnsupportedError(
                f"cell row {row}: an image with {channels} channels that is neither PNG nor TIFF cannot be "
                'decoded as stored; decode with "rgb" or "gray"'
            )
        return Decoding(colors, header.dtype.name)


def reason(error: RuntimeError) -> str:
    """Return DALI's reason for an error, without the place in its graph."""
    _, _, text = str(error).rpartition("encountered:")
    lines = [line.strip(" :") for line in text.splitlines() if line.strip(" :")]
    kept = [line for line in lines if not line.startswith("Current pipeline object")]
    return kept[0] if kept else "DALI gives no reason"


def decode_images(
    images: Sequence[np.ndarray],
    channels: str = "rgb",
    *,
    cells: Sequence[int] | np.ndarray | None = None,
    num_threads: int | None = None,
) -> list[np.ndarray]:
    """Decode images in a file format, on the CPU.

    Parameters
    ----------
    images
        uint8, 1-D: the bytes of a JPEG, PNG or TIFF each. Those without elements stay so.
    channels
        ``"rgb"``, ``"gray"`` (luma of ITU-R BT.601 if there are colors), or ``"any"``: as many as stored.
    cells
        Row numbers for messages; default: positions.
    num_threads
        DALI's (default: the cores this process may use).

    Returns
    -------
    list of np.ndarray
        (C, H, W) each, uint8, or uint16 where more than 8 bits are stored. Pixels as stored: EXIF does not
        turn them.

    Raises
    ------
    CorruptDataError
        An image that cannot be decoded; names its cell row.
    UnsupportedError
        A TIFF has several pages, separate planes, or samples that are not unsigned integers.
    DeviceUnavailableError
        DALI is not installed.
    """
    rows = np.arange(len(images)) if cells is None else np.asarray(cells, np.int64)
    decoder = Decoder(channels, threads(num_threads))
    found = collect(images, rows)
    out = [np.empty((0, 0, 0), np.uint8)] * len(images)
    if not len(found.places):
        return out
    data = found.data
    if not found.encoded or isinstance(data, np.ndarray):
        raise ValueError(
            f"images must be bytes: uint8 arrays with one axis; got shape {np.shape(data[0])}. "
            "Tiles need no decoding"
        )
    rows = rows[found.places]
    decodings, _ = decoder.look(data, rows)
    for decoding in dict.fromkeys(decodings):
        chosen = [position for position, other in enumerate(decodings) if other == decoding]
        decoded = decoder.decode([data[position] for position in chosen], rows[chosen], decoding)
        for position, array in zip(chosen, decoded, strict=True):
            out[found.places[position]] = array
    return out


def threads(wanted: int | None) -> int:
    """DALI's threads: as many as wanted, or the cores that this process may use."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"num_threads must be at least 1, got {wanted}")
    return wanted or cores()
