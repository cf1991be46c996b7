"""Images and image files that the tests of this folder share."""

from __future__ import annotations

import io
import struct
from typing import Any, Literal

import numpy as np
from PIL import Image


def picture(height: int = 50, width: int = 70, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (h, w, C): smooth, with noise, and another per seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [
        127 + 100 * np.sin(rows / rng.uniform(5, 9) + k) * np.cos(columns / rng.uniform(5, 9))
        for k in range(channels)
    ]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 6, (height, width, channels)), 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str, *, mode: str | None = None, **options: Any) -> np.ndarray:
    """Bytes of an image file, uint8 1-D; (h, w, 1) is written as gray."""
    pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    image = Image.fromarray(pixels)
    with io.BytesIO() as file:
        (image if mode is None else image.convert(mode)).save(file, kind, **options)
        return np.frombuffer(file.getvalue(), np.uint8)


def opened(data: np.ndarray, mode: str) -> np.ndarray:
    """(C, h, w) as Pillow decodes it."""
    pixels = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert(mode))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def tiff(pixels: np.ndarray, *, planar: int = 1, photometric: int = 1, following: int = 0, big: bool = False,
         order: Literal["<", ">"] = "<") -> np.ndarray:  # fmt: skip
    """Bytes of an uncompressed TIFF of (h, w, C) with any number of channels, which Pillow does not write."""
    height, width, channels = pixels.shape
    body = (pixels if planar == 1 else pixels.transpose(2, 0, 1)).astype(pixels.dtype.newbyteorder(order))
    data, strips = body.tobytes(), channels if planar == 2 else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    offset_code, word = ("Q", 8) if big else ("I", 4)
    entries: list[tuple[int, str, list[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [8 * pixels.itemsize] * channels),
        (259, "H", [1]),
        (262, "H", [photometric]),
        (273, "I", [0] * strips),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(data) // strips] * strips),
        (284, "H", [planar]),
        (338, "H", [0] * max(1, channels - (3 if photometric == 2 else 1))),
        (339, "H", [kind] * channels),
    ]
    if channels == (3 if photometric == 2 else 1):
        del entries[10]

    def packed(code: str, values: list[int]) -> bytes:
        return struct.pack(f"{order}{len(values)}{code}", *values)

    first = 16 if big else 8
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    outside = first + len(count) + len(entries) * (4 + 2 * word) + word
    begin = outside + sum(len(packed(c, v)) for _, c, v in entries if len(packed(c, v)) > word)
    entries[5] = (273, "I", [begin + k * (len(data) // strips) for k in range(strips)])
    directory, extra = count, b""
    for tag, code, values in entries:
        content = packed(code, values)
        directory += struct.pack(order + "HH" + offset_code, tag, {"H": 3, "I": 4}[code], len(values))
        if len(content) > word:
            directory += struct.pack(order + offset_code, outside + len(extra))
            extra += content
        else:
            directory += content.ljust(word, b"\0")
    directory += struct.pack(order + offset_code, following)
    mark = b"II" if order == "<" else b"MM"
    header = mark + (struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8))
    return np.frombuffer(header + directory + extra + data, np.uint8)
