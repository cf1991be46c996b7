"""DALI against plain NumPy, on the CPU; and that only the cell decides what becomes of a tile."""

from __future__ import annotations

import pickle
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._devices import dali_missing
from hbx_gpu._draws import uniform
from hbx_gpu.errors import DeviceUnavailableError, InvalidDataError
from hbx_gpu.images import ImagePipeline, ImageTransform
from hbx_gpu.images._draws import Step
from hbx_gpu.images._reference import resize_matrix, transform_tiles
from tests.dali import need_dali

SEED, EPOCH = 2**40 + 5, 4
SCALES = {"uint8": 255, "int16": 3000, "uint16": 65535, "float32": 1000.0}
AUGMENT = ImageTransform(
    random_crop=(20, 30), vertical_flip=0.5, horizontal_flip=0.5, mean=(100, 110, 120), std=(50, 51, 52)
)

# Arithmetic in float32 over a handful of operations: some 1e-6 of the largest value.
ARITHMETIC = 3e-6
# Rotation steps through source coordinates in float32: up to 1e-4 of a pixel off at these sizes, times the
# difference of neighbors, which in noise is the whole range.
ROTATION = 2e-4
# Bilinear weights are float32; places are stepped likewise.
BILINEAR = 1e-5
# DALI tabulates these two kernels at 32 places per pixel and interpolates between them: 1e-3 of the range.
TABULATED = 1.5e-3


@pytest.fixture(autouse=True)
def _dali() -> None:
    need_dali()


def noise(dtype: str, shape: tuple[int, ...] = (9, 3, 40, 50), seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * SCALES[dtype]).astype(dtype)


def both(
    transform: ImageTransform, tiles: Any, *, cells: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(DALI's, the reference's), equal in shape and type."""
    cells = np.arange(len(tiles)) * 7 + 3 if cells is None else cells
    found = ImagePipeline(transform, seed=SEED, num_threads=2)(tiles, cells, EPOCH)
    assert found.is_contiguous()
    as_tiles = [tile[None] if tile.ndim == 2 else tile for tile in tiles]
    expected = transform_tiles(transform, as_tiles, list(cells), EPOCH, seed=SEED)
    assert found.shape == expected.shape
    assert found.numpy().dtype == expected.dtype
    return found.numpy(), expected


def assert_close(transform: ImageTransform, tiles: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest value the reference gives, normalization undone."""
    found, expected = both(transform, tiles)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


EXACT = [
    ImageTransform(),
    ImageTransform(dtype="uint8"),
    ImageTransform(random_crop=(20, 30)),
    ImageTransform(random_crop=(40, 1)),
    ImageTransform(center_crop=21),
    ImageTransform(vertical_flip=0.5),
    ImageTransform(horizontal_flip=0.5),
    ImageTransform(mean=(100, 110, 120), std=7),
    ImageTransform(scale=True),
    AUGMENT,
    ImageTransform(random_crop=(20, 30), vertical_flip=0.5, scale=True, mean=0.4, std=(0.1, 0.2, 0.3)),
    ImageTransform(random_crop=(20, 30), vertical_flip=0.5, mean=100.0, std=50.0, dtype="float16"),
]


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("transform", EXACT, ids=range(len(EXACT)))
def test_what_only_moves_and_normalizes_is_exact(transform: ImageTransform, dtype: str) -> None:
    found, expected = both(transform, noise(dtype))
    if transform.dtype == "float16":  # DALI rounds halves away from zero, NumPy to even
        np.testing.assert_array_max_ulp(found, expected, 1)
    else:
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_rotation(interpolation: str, dtype: str) -> None:
    transform = ImageTransform(
        random_crop=(30, 40), horizontal_flip=0.5, rotation=60, fill=77, interpolation=interpolation
    )
    assert_close(transform, noise(dtype), 0 if interpolation == "nearest" else ROTATION)


def test_rotation_is_counter_clockwise() -> None:
    tile = np.zeros((1, 1, 5, 5), np.uint8)
    tile[0, 0, 2, 4] = 255  # right of the center
    for cell in range(200):
        pipeline = ImagePipeline(ImageTransform(rotation=100), num_threads=1)
        turned = pipeline(tile, [cell], 0)[0, 0]
        row = int(turned.argmax()) // 5
        angle = (2 * uniform(0, 0, np.array([cell]), [Step.ROTATION])[0, 0, 0] - 1) * 100
        if 60 < angle:
            assert row < 2
            return
    raise AssertionError("no angle above 60 degrees in 200 draws")


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("interpolation", "tolerance"),
    [("nearest", 0), ("bilinear", BILINEAR), ("bicubic", TABULATED), ("lanczos", TABULATED)],
)
def test_resize(interpolation: str, tolerance: float, antialias: bool, dtype: str) -> None:
    # From odd sizes: no nearest neighbor is a tie.
    for size in [(17, 23), (61, 83), (37, 24), (7, 111)]:
        transform = ImageTransform(resize=size, interpolation=interpolation, antialias=antialias)
        assert_close(transform, noise(dtype, (3, 2, 37, 51)), tolerance)


def test_reference_resize_is_pillows_away_from_the_border() -> None:
    """Where the filter stays inside, so that borders do not matter."""
    from PIL import Image

    row = np.random.default_rng(0).random(200).astype(np.float32)
    kinds = Image.Resampling
    for name, kind in [("bilinear", kinds.BILINEAR), ("bicubic", kinds.BICUBIC), ("lanczos", kinds.LANCZOS)]:
        for size in (83, 317):
            expected = np.asarray(Image.fromarray(np.tile(row, (4, 1))).resize((size, 4), kind))[0]
            inner = slice(size // 8, -size // 8)
            assert np.allclose(
                (resize_matrix(200, size, name, True) @ row)[inner], expected[inner], atol=1e-5
            )


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize(
    "transform",
    [
        ImageTransform(brightness=0.4),
        ImageTransform(contrast=0.4),
        ImageTransform(brightness=(0.2, 0.5), contrast=(1.5, 2)),
        ImageTransform(saturation=0.7),
        ImageTransform(hue=0.5),
        ImageTransform(
            random_crop=(20, 30), vertical_flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2
        ),
    ],
    ids=range(6),
)
def test_color(transform: ImageTransform, dtype: str) -> None:
    assert_close(transform, noise(dtype), ARITHMETIC)


def test_all_steps_in_order() -> None:
    transform = ImageTransform(
        random_crop=(30, 40), vertical_flip=0.5, horizontal_flip=0.5, rotation=30, fill=9, resize=(25, 33),
        brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, scale=True, mean=(0.4, 0.5, 0.6), std=0.2,
    )  # fmt: skip
    for dtype in ("uint8", "uint16"):
        assert_close(transform, noise(dtype), ROTATION)


def test_uint8_rounds_halves_up_and_clips() -> None:
    tiles = np.array([[[[-5, 0.49, 0.5, 1.5, 254.4, 254.5, 300, 7e4]]]], np.float32)
    found = ImagePipeline(ImageTransform(dtype="uint8"), num_threads=1)(tiles, [0])
    assert found.flatten().tolist() == [0, 0, 1, 2, 254, 255, 255, 255]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels: int) -> None:
    tiles = noise("uint16", (4, channels, 20, 24))
    transform = ImageTransform(
        random_crop=(12, 13), rotation=20, resize=(9, 10), contrast=0.3, mean=tuple(range(channels)), std=9
    )
    assert_close(transform, tiles, ROTATION)


@pytest.mark.parametrize(("stored", "taken"), [("bool", "uint8"), ("int8", "int16"), ("float16", "float32")])
def test_types_that_a_larger_one_holds(stored: str, taken: str) -> None:
    tiles = (np.random.default_rng(0).integers(0, 120, (4, 3, 20, 24)) - (stored != "bool") * 60).astype(
        stored
    )
    transform = ImageTransform(random_crop=9, vertical_flip=0.5)
    pipeline = ImagePipeline(transform, num_threads=1)
    assert torch.equal(pipeline(tiles, range(4)), pipeline(tiles.astype(taken), range(4)))


def test_byte_order_and_strides_do_not_matter() -> None:
    tiles = noise("uint16")
    pipeline = ImagePipeline(ImageTransform(random_crop=9), num_threads=1)
    expected = pipeline(tiles, range(9))
    assert torch.equal(pipeline(tiles.astype(">u2"), range(9)), expected)
    assert torch.equal(pipeline(np.asfortranarray(tiles), range(9)), expected)
    assert torch.equal(pipeline([tile.astype(">u2") for tile in tiles], range(9)), expected)


def test_shapes_that_differ() -> None:
    tiles = [noise("uint8", (3, 30 + k, 60 - 3 * k), seed=k) for k in range(8)]
    found, expected = both(AUGMENT, tiles)
    assert np.array_equal(found, expected)
    assert_close(ImageTransform(rotation=30, resize=(21, 22)), tiles, ROTATION)


def test_two_axes_are_one_channel() -> None:
    tiles = noise("uint8", (5, 30, 40))
    found, expected = both(ImageTransform(random_crop=9), list(tiles))
    assert np.array_equal(found, expected)
    dense = ImagePipeline(ImageTransform(random_crop=9), seed=SEED, num_threads=1)(
        tiles, np.arange(5) * 7 + 3, EPOCH
    )
    assert np.array_equal(dense.numpy(), expected)


def test_types_may_differ_from_tile_to_tile() -> None:
    """Datasets of one atlas may be stored in different types; `scale` belongs to each one's own."""
    tiles = [noise(dtype, (3, 30, 40)) for dtype in ("uint8", "uint16", "float32", "uint8", "uint16")]
    found, expected = both(ImageTransform(random_crop=9, scale=True, mean=0.5, std=0.2), tiles)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_batches_threads_and_order_do_not_matter(ragged: bool) -> None:
    transform = ImageTransform(
        random_crop=(20, 25), horizontal_flip=0.5, rotation=20, brightness=0.2, contrast=0.2, hue=0.1
    )
    tiles: Any = noise("uint8", (40, 3, 30, 36))
    cells = np.random.default_rng(1).permutation(1000)[:40]
    pipeline = ImagePipeline(transform, seed=1, num_threads=2)

    def take(rows: np.ndarray) -> Any:
        return [tiles[row] for row in rows] if ragged else tiles[rows]

    whole = pipeline(take(np.arange(40)), cells, 2)
    order = np.random.default_rng(2).permutation(40)
    other = ImagePipeline(transform, seed=1, num_threads=1)
    found = torch.empty_like(whole)
    for part in np.split(order, [1, 4, 29]):
        found[torch.from_numpy(part)] = other(take(part), cells[part], 2)
    assert torch.equal(found, whole)
    assert not torch.equal(pipeline(take(np.arange(40)), cells, 3), whole)


def test_many_threads_at_once() -> None:
    tiles = noise("uint8", (16, 3, 40, 50))
    pipeline = ImagePipeline(AUGMENT, num_threads=1)
    expected = [pipeline(tiles, range(16), epoch) for epoch in range(6)]
    failed: list[Any] = []

    def call() -> None:
        for epoch in range(6):
            n = 16 - epoch  # sizes vary
            if not torch.equal(pipeline(tiles[:n], range(n), epoch), expected[epoch][:n]):
                failed.append(epoch)

    threads = [threading.Thread(target=call) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_outputs_and_inputs_stay_untouched_by_later_calls() -> None:
    tiles = noise("uint8", (8, 3, 40, 50))
    before = tiles.copy()
    pipeline = ImagePipeline(ImageTransform(random_crop=9), num_threads=1)
    first = pipeline(tiles, range(8))
    kept = first.clone()
    for _ in range(4):
        pipeline(np.zeros_like(tiles), range(8))
    assert torch.equal(first, kept)
    first.zero_()  # is the caller's
    assert np.array_equal(tiles, before)


def test_batches_of_any_size() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2500, 1, 6, 7), dtype=np.uint8)
    pipeline = ImagePipeline(ImageTransform(random_crop=4, vertical_flip=0.5), num_threads=2)
    whole = torch.cat(
        [pipeline(tiles[part], np.arange(2500)[part]) for part in np.split(np.arange(2500), [9, 99])]
    )
    assert torch.equal(pipeline(tiles, range(2500)), whole)
    assert torch.equal(pipeline(tiles[:3], range(3)), whole[:3])


def test_pickled() -> None:
    pipeline = ImagePipeline(AUGMENT, seed=9, num_threads=1, decode="gray", tile_shape=(3, 40, 50))
    copy = pickle.loads(pickle.dumps(pipeline))
    tiles = noise("uint8")
    assert torch.equal(copy(tiles, range(9), 1), pipeline(tiles, range(9), 1))
    assert (copy.decode, copy.tile_shape, copy.seed) == ("gray", (3, 40, 50), 9)


class TestAbsentCells:
    """Their rows are zeros after everything, and those of the others are as without them."""

    transform = ImageTransform(random_crop=(20, 30), brightness=0.2, mean=(100, 110, 120), std=3)

    def test_masked(self) -> None:
        tiles, present = noise("uint8"), np.arange(9) % 3 != 1
        pipeline = ImagePipeline(self.transform, num_threads=1)
        found = pipeline(tiles, range(9), present=present)
        assert torch.equal(found[present], pipeline(tiles, range(9))[present])
        assert not found[~present].any()

    def test_without_elements(self) -> None:
        tiles = list(noise("uint8"))
        pipeline = ImagePipeline(self.transform, num_threads=1)
        expected = pipeline(tiles, range(9))
        tiles[0], tiles[4], tiles[8] = (
            np.empty(0, np.uint8),
            np.empty((3, 0, 0)),
            np.empty((0, 0, 0), np.uint8),
        )
        found = pipeline(tiles, range(9))
        assert not found[[0, 4, 8]].any()
        assert torch.equal(found[[1, 2, 3, 5, 6, 7]], expected[[1, 2, 3, 5, 6, 7]])

    def test_all_of_them(self) -> None:
        pipeline = ImagePipeline(self.transform, num_threads=1)
        found = pipeline([np.empty(0)] * 3, range(3))  # mean says how many channels
        assert found.shape == (3, 3, 20, 30)
        assert not found.any()
        assert pipeline(noise("uint8"), range(9), present=np.zeros(9, bool)).shape == (9, 3, 20, 30)

    def test_nothing_says_their_shape(self) -> None:
        with pytest.raises(ValueError, match=r"give tile_shape=\(C, h, w\)"):
            ImagePipeline(ImageTransform(random_crop=9), num_threads=1)([np.empty(0)], [0])
        pipeline = ImagePipeline(ImageTransform(random_crop=9), num_threads=1, tile_shape=(4, 20, 20))
        assert pipeline([np.empty(0)], [0]).shape == (1, 4, 9, 9)

    def test_no_cells_at_all(self) -> None:
        pipeline = ImagePipeline(AUGMENT, num_threads=1)
        assert pipeline(np.empty((0, 3, 40, 50), np.uint8), []).shape == (0, 3, 20, 30)
        assert pipeline([], []).shape == (0, 3, 20, 30)
        assert pipeline([], []).dtype == torch.float32


class TestBadInput:
    """Errors name the cell."""

    @pytest.mark.parametrize(
        ("tiles", "error", "words"),
        [
            (
                np.zeros((2, 3, 10, 40), np.uint8),
                ValueError,
                "cell row 50: its tile is 10 x 40 pixels, smaller",
            ),
            (
                [np.zeros((3, 30, 40)), np.zeros((3, 9, 40))],
                InvalidDataError,
                "cell row 50: tiles are float64",
            ),
            (
                [np.zeros((3, 30, 40), np.uint8), np.zeros((3, 30, 2), np.uint8)],
                ValueError,
                r"cell row 51: its tile is 30 x 2 .*1 of 2",
            ),
            (
                [np.zeros((3, 30, 40), np.uint8), np.zeros((2, 30, 40), np.uint8)],
                ValueError,
                r"channels differ: cell row 50 has \(3, 30, 40\), cell row 51 has \(2, 30, 40\)",
            ),
            (np.zeros((2, 4, 30, 40), np.uint8), ValueError, "given for 3 channels, and these tiles have 4"),
            (
                np.zeros((2, 3, 30, 40), np.int64),
                InvalidDataError,
                "int64, which DALI's image operators do not",
            ),
            (np.zeros((2, 5, 3, 30, 40), np.uint8), ValueError, "time, depth and other leading axes"),
            ([np.zeros((2, 5, 3, 30, 40), np.uint8)] * 2, ValueError, "cell row 50: a tile must be"),
            (np.zeros((2, 900), np.uint8), ValueError, r"tiles must be \(n, C, H, W\)"),
            (np.zeros((3, 3, 30, 40), np.uint8), ValueError, "3 tiles, 2 cells"),
        ],
    )
    def test_tiles(self, tiles: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            ImagePipeline(AUGMENT, num_threads=1)(tiles, [50, 51])

    def test_shapes_that_nothing_makes_equal(self) -> None:
        tiles = [np.zeros((1, 30, 40), np.uint8), np.zeros((1, 31, 40), np.uint8)]
        with pytest.raises(ValueError, match=r"shapes differ: cell row 4 has .*add a crop or resize"):
            ImagePipeline(ImageTransform(horizontal_flip=1), num_threads=1)(tiles, [4, 5])

    def test_present_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="present must have one entry per tile: 2 tiles"):
            ImagePipeline(AUGMENT, num_threads=1)(noise("uint8")[:2], [0, 1], present=np.ones(3, bool))

    def test_uint16_in_float16(self) -> None:
        with pytest.raises(ValueError, match=r"float16 ends at 65,504"):
            ImagePipeline(ImageTransform(dtype="float16"), num_threads=1)(noise("uint16"), range(9))

    def test_options(self) -> None:
        with pytest.raises(ValueError, match="num_threads must be at least 1"):
            ImagePipeline(AUGMENT, num_threads=0)
        with pytest.raises(ValueError, match=r"tile_shape must be \(C, h, w\)"):
            ImagePipeline(AUGMENT, tile_shape=(3, 4))
        with pytest.raises(ValueError, match="seed must be"):
            ImagePipeline(AUGMENT, seed=-1)
        with pytest.raises(ValueError, match="channels must be one of"):
            ImagePipeline(AUGMENT, decode="bgr")

    def test_a_good_call_works_after_a_bad_one(self) -> None:
        pipeline = ImagePipeline(AUGMENT, num_threads=1)
        tiles = noise("uint8")
        expected = pipeline(tiles, range(9))
        with pytest.raises(ValueError, match="smaller"):
            pipeline(tiles[:, :, :5], range(9))
        assert torch.equal(pipeline(tiles, range(9)), expected)


def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    dali_missing.cache_clear()
    try:
        with pytest.raises(DeviceUnavailableError, match=r"image tiles go through DALI, but .*pip install"):
            ImagePipeline(AUGMENT)
    finally:
        monkeypatch.undo()
        dali_missing.cache_clear()


def test_tiles_of_a_real_atlas(homeobox_fixtures: Path) -> None:
    """uint8 tiles of one plate, uint16 tiles of another."""
    import zarr

    for plate, size in [("plate0", (4, 5)), ("plate1", (3, 2))]:
        store = (
            homeobox_fixtures / "image_tiles" / "atlas" / "zarr_store" / plate / "tiles" / "layers" / "raw"
        )
        tiles = np.asarray(zarr.open_array(store, mode="r")[:])
        found, expected = both(ImageTransform(random_crop=size, vertical_flip=0.5, scale=True), tiles)
        assert np.array_equal(found, expected)


def test_documented_example() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "images.md"
    (source,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(page), "exec"), namespace)
    assert (namespace["batch"].shape, namespace["batch"].dtype) == ((32, 5, 64, 64), torch.float32)


def test_arrays_that_cannot_be_written_to() -> None:
    """Memory maps, and files as bytes."""
    tiles = noise("uint8")
    pipeline = ImagePipeline(AUGMENT, num_threads=1)
    expected = pipeline(tiles, range(9))
    tiles.flags.writeable = False
    assert torch.equal(pipeline(tiles, range(9)), expected)
    assert torch.equal(pipeline(list(tiles), range(9)), expected)
