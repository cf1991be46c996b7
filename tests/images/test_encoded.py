"""Encoded images: decoded as Pillow decodes them, and refused where pixels would be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.images import ImagePipeline, ImageTransform, decode_images
from hbx_gpu.images._encoded import read_header
from tests.dali import need_dali
from tests.images.files import encode, opened, picture, tiff

RGB, GRAY = picture(), picture(channels=1)
DEEP = (GRAY[:, :, 0].astype(np.uint16) * 211) + 7
LOSSLESS = {
    "png": encode(RGB, "PNG"),
    "png gray": encode(GRAY, "PNG"),
    "png alpha": encode(np.dstack([RGB, GRAY]), "PNG"),
    "tiff": encode(RGB, "TIFF"),
    "tiff lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff gray": encode(GRAY, "TIFF"),
}


@pytest.fixture(autouse=True)
def _dali() -> None:
    need_dali()


@pytest.mark.parametrize("name", LOSSLESS)
def test_png_and_tiff_are_exact(name: str) -> None:
    (found,) = decode_images([LOSSLESS[name]], "rgb")
    assert found.dtype == np.uint8
    assert np.array_equal(found, opened(LOSSLESS[name], "RGB"))


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 60}, {"quality": 95, "subsampling": 0}])
@pytest.mark.parametrize("pixels", [RGB, GRAY, picture(33, 47)], ids=["rgb", "gray", "odd"])
def test_jpeg_is_pillows(pixels: np.ndarray, options: dict[str, Any]) -> None:
    """Both decode with libjpeg-turbo; one level, should their versions round the inverse DCT otherwise."""
    data = encode(pixels, "JPEG", **options)
    (found,) = decode_images([data], "rgb")
    assert np.abs(found.astype(int) - opened(data, "RGB")).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_gray_is_luma(kind: str) -> None:
    """A JPEG stores its own luma; the others are weighted, and rounding may go either way."""
    data = encode(RGB, kind)
    (found,) = decode_images([data], "gray")
    assert found.shape == (1, 50, 70)
    assert np.abs(found.astype(int) - opened(data, "L")).max() <= (3 if kind == "JPEG" else 1)


def test_any_keeps_the_channels() -> None:
    files = [
        encode(RGB, "PNG"),
        encode(GRAY, "PNG"),
        encode(np.dstack([RGB, GRAY]), "PNG"),
        encode(GRAY, "TIFF"),
    ]
    found = decode_images(files, "any")
    for array, pixels in zip(found, [RGB, GRAY, np.dstack([RGB, GRAY]), GRAY], strict=True):
        assert np.array_equal(array, pixels.transpose(2, 0, 1))


def test_gray_jpeg_as_stored() -> None:
    """DALI itself, asked for a gray JPEG "as stored", writes outside its memory."""
    data = encode(GRAY, "JPEG")
    for _ in range(3):
        (found,) = decode_images([data], "any")
        assert found.shape == (1, 50, 70)
        assert np.abs(found.astype(int) - opened(data, "L")).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_stay(kind: str) -> None:
    (found,) = decode_images([encode(DEEP, kind)], "gray")
    assert found.dtype == np.uint16
    assert np.array_equal(found[0], DEEP)


@pytest.mark.parametrize("options", [{}, {"big": True}, {"order": ">"}])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_tiff_with_many_channels(channels: int, dtype: str, options: dict[str, Any]) -> None:
    pixels = picture(channels=channels).astype(dtype) * (1 if dtype == "uint8" else 257)
    (found,) = decode_images([tiff(pixels, **options)], "any")
    assert found.dtype == dtype
    assert np.array_equal(found, pixels.transpose(2, 0, 1))


def test_orientation_is_left_alone() -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    data = encode(RGB, "JPEG", exif=exif)
    assert decode_images([data])[0].shape == (3, 50, 70)
    found = ImagePipeline(ImageTransform(random_crop=(50, 70)), num_threads=1)([data], [0])
    assert found.shape == (1, 3, 50, 70)


def test_nothing_and_absent_images() -> None:
    assert decode_images([]) == []
    found = decode_images([np.empty(0, np.uint8), encode(GRAY, "PNG")], "gray")
    assert found[0].size == 0
    assert np.array_equal(found[1][0], GRAY[:, :, 0])


AUGMENT = ImageTransform(
    random_crop=(20, 30), vertical_flip=0.5, horizontal_flip=0.5, mean=100, std=(50, 51, 52)
)
RESIZED = ImageTransform(
    random_crop=(40, 40),
    horizontal_flip=0.5,
    rotation=20,
    resize=(24, 25),
    brightness=0.2,
    contrast=0.1,
    hue=0.1,
)


@pytest.mark.parametrize("transform", [AUGMENT, RESIZED], ids=["moved", "interpolated"])
def test_same_steps_as_for_tiles(transform: ImageTransform) -> None:
    """Decoding in the graph, or before it, is the same; images differ in size and in kind of file."""
    pixels = [picture(50 + k, 70 - 2 * k, seed=k) for k in range(8)]
    files = [encode(image, ("PNG", "TIFF", "JPEG")[k % 3]) for k, image in enumerate(pixels)]
    cells = np.arange(8) * 11
    pipeline = ImagePipeline(transform, seed=3, num_threads=2)
    found = pipeline(files, cells, 2)
    assert torch.equal(found, pipeline(decode_images(files), cells, 2))
    order = np.random.default_rng(0).permutation(8)
    again = pipeline([files[k] for k in order], cells[order], 2)
    assert torch.equal(again, found[torch.from_numpy(order)])


def test_8_and_16_bits_in_one_batch() -> None:
    pipeline = ImagePipeline(ImageTransform(scale=True), num_threads=1, decode="gray")
    found = pipeline([encode(GRAY, "PNG"), encode(DEEP, "PNG")], [0, 1])
    assert torch.equal(found[0, 0], torch.from_numpy(GRAY[:, :, 0] * (np.float32(1) / np.float32(255))))
    assert torch.equal(found[1, 0], torch.from_numpy(DEEP * (np.float32(1) / np.float32(65535))))


def test_absent_cells_are_zeros() -> None:
    pipeline = ImagePipeline(AUGMENT, num_threads=1)
    none = np.empty(0, np.uint8)
    found = pipeline([none, encode(RGB, "PNG"), none], range(3))
    assert not found[[0, 2]].any()
    assert found[1].any()
    assert pipeline([none, none], range(2)).shape == (2, 3, 20, 30)


def damaged() -> dict[str, np.ndarray]:
    jpeg, png, tif = encode(RGB, "JPEG"), encode(RGB, "PNG").copy(), encode(RGB, "TIFF")
    png[200:260] ^= 255
    return {
        "noise": np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8),
        "jpeg cut in the header": jpeg[:300],
        "png cut in the header": encode(RGB, "PNG")[:20],
        "png with a wrong checksum": png,
        "tiff cut": tif[: len(tif) // 3],
        "tiff cut in the header": tif[:7],
        "one byte": np.array([0xFF], np.uint8),
        "zeros": np.zeros(100, np.uint8),
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_bytes_name_their_cell(name: str) -> None:
    files = [encode(RGB, "PNG"), encode(RGB, "JPEG"), damaged()[name], encode(RGB, "TIFF")]
    pipeline = ImagePipeline(AUGMENT, num_threads=1)
    for call in (
        lambda: pipeline(files, [10, 11, 12, 13]),
        lambda: decode_images(files, cells=[10, 11, 12, 13]),
    ):
        with pytest.raises(CorruptDataError, match="cell row 12: ") as caught:
            call()
        message = str(caught.value)
        assert "Traceback" not in message
        assert "traceback" not in message
        assert len(message) < 400
    assert pipeline(files[:2], [10, 11]).shape == (2, 3, 20, 30)  # and goes on


def test_smaller_than_the_crop() -> None:
    with pytest.raises(
        ValueError, match="cell row 8: its tile is 19 x 70 pixels, smaller than the crop 20 x 30"
    ):
        ImagePipeline(AUGMENT, num_threads=1)([encode(RGB, "PNG"), encode(RGB[:19], "PNG")], [7, 8])


@pytest.mark.parametrize(
    ("data", "channels", "words"),
    [
        (tiff(RGB.astype(np.float32), photometric=2), "rgb", "floating point of 32 bits"),
        (tiff(RGB.astype(np.int16), photometric=2), "rgb", "signed integers of 16 bits"),
        (tiff(RGB.astype(np.uint32), photometric=2), "rgb", "unsigned integers of 32 bits"),
        (tiff(RGB, planar=2, photometric=2), "rgb", "separate planes"),
        (tiff(RGB, following=8), "any", "several pages"),
        (tiff(picture(channels=5)), "rgb", "several channels that are not colors"),
        (encode(RGB, "JPEG", mode="CMYK"), "any", "4 channels that is neither PNG nor TIFF"),
    ],
)
def test_what_would_be_decoded_wrong(data: np.ndarray, channels: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cell row 6: .*{words}"):
        decode_images([data], channels, cells=[6])


def test_channels_that_differ() -> None:
    pipeline = ImagePipeline(ImageTransform(random_crop=9), num_threads=1, decode="any")
    with pytest.raises(ValueError, match=r"channels differ: cell row 4 has .*cell row 5 has"):
        pipeline([encode(RGB, "PNG"), encode(GRAY, "PNG")], [4, 5])


def test_tiles_and_encoded_images_in_one_batch() -> None:
    with pytest.raises(
        ValueError, match=r"not both: cell row 5 has one axis, cell row 4 has shape \(3, 50, 70\)"
    ):
        ImagePipeline(AUGMENT, num_threads=1)([RGB.transpose(2, 0, 1), encode(RGB, "PNG")], [4, 5])
    with pytest.raises(ValueError, match="Tiles need no decoding"):
        decode_images([RGB])
    with pytest.raises(ValueError, match=r"cell row 0: an array with one axis .* got float32"):
        decode_images([np.zeros(9, np.float32)])


def test_headers_that_lie_are_errors_not_crashes() -> None:
    """Any byte of a header may be wrong: something is said, or a header comes out."""
    rng = np.random.default_rng(0)
    for data in (tiff(RGB), tiff(RGB, big=True), encode(RGB, "PNG")):
        for _ in range(300):
            wrong = data[:400].copy()
            wrong[rng.integers(4, 250, 4)] = rng.integers(0, 256, 4)
            try:
                read_header(wrong)
            except (CorruptDataError, UnsupportedError):
                continue
