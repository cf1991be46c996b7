"""The GPU graph: where its operators run, without a GPU; and with one, that it gives what the CPU gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu.errors import DeviceUnavailableError
from hbx_gpu.images import ImagePipeline, ImageTransform
from tests.dali import need_dali
from tests.gpu import gpu_missing
from tests.images.files import encode, picture

MOVED = ImageTransform(
    random_crop=(20, 30), vertical_flip=0.5, horizontal_flip=0.5, mean=100, std=(50, 51, 52)
)
INTERPOLATED = ImageTransform(
    random_crop=(30, 40), vertical_flip=0.5, horizontal_flip=0.5, rotation=30, fill=9, resize=(25, 33),
    brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, scale=True, mean=0.4, std=(0.2, 0.3, 0.4),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _dali() -> None:
    need_dali()


def operators(transform: ImageTransform, *, gpu: bool, encoded: bool) -> dict[str, tuple[str, list[str]]]:
    """(device, devices of inputs) by operator of a graph that is not built."""
    from nvidia.dali.pipeline import Pipeline

    from hbx_gpu.images._graph import Decoding, transform_graph

    pipe: Any = Pipeline(batch_size=8, num_threads=1, device_id=0 if gpu else None, prefetch_queue_depth=1)
    decoding = Decoding("rgb", "uint8") if encoded else None
    with pipe:
        pipe.set_outputs(transform_graph(transform, np.dtype(np.uint8), gpu=gpu, decoding=decoding))
    pipe._build_graph()
    return {
        op.name: (
            op.outputs[0].device,
            [str(node.device) for node in op.inputs or [] if hasattr(node, "device")],
        )
        for op in pipe._ops
    }


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("transform", [MOVED, INTERPOLATED], ids=["moved", "interpolated"])
def test_where_operators_run(transform: ImageTransform, encoded: bool) -> None:
    found = operators(transform, gpu=True, encoded=encoded)
    arguments = {
        "crop_y",
        "crop_x",
        "vertical_flip",
        "horizontal_flip",
        "rotation",
        "gain",
        "offset",
        "colors",
    }
    for name, (device, _) in found.items():
        # What was drawn, and bytes of files, begin on the host; all else is on the GPU.
        host = name in arguments or (encoded and name == "tiles")
        assert (name, device) == (name, "cpu" if host else "gpu")
    assert (found["tiles"][0] == "gpu") is not encoded
    assert {device for device, _ in operators(transform, gpu=False, encoded=encoded).values()} == {"cpu"}


@pytest.mark.skipif(not gpu_missing(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(DeviceUnavailableError, match="device='cuda:0' was asked for, but"):
        ImagePipeline(MOVED, device_id=0)


def pair(transform: ImageTransform, **options: Any) -> tuple[ImagePipeline, ImagePipeline]:
    """(CPU, GPU)."""
    return (
        ImagePipeline(transform, seed=3, num_threads=2, **options),
        ImagePipeline(transform, seed=3, num_threads=2, device_id=0, **options),
    )


def assert_same(cpu: torch.Tensor, gpu: torch.Tensor, tolerance: float) -> None:
    assert gpu.is_cuda
    assert (cpu.shape, cpu.dtype) == (gpu.shape, gpu.dtype)
    assert (gpu.cpu().double() - cpu.double()).abs().max() <= tolerance * cpu.double().abs().max()


@pytest.mark.gpu
class TestOnGpu:
    """Multiply-add in one rounding, texture coordinates: tolerances are in parts of the largest value."""

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
    @pytest.mark.parametrize(("transform", "tolerance"), [(MOVED, 1e-6), (INTERPOLATED, 2e-3)])
    def test_tiles(self, transform: ImageTransform, tolerance: float, dtype: str) -> None:
        tiles = (np.random.default_rng(0).random((9, 3, 40, 50)) * 255).astype(dtype)
        cpu, gpu = pair(transform)
        for epoch in range(4):
            assert_same(cpu(tiles, range(9), epoch), gpu(tiles, range(9), epoch), tolerance)

    def test_ragged_and_absent(self) -> None:
        tiles = [picture(40 + k, 60 - k, seed=k).transpose(2, 0, 1) for k in range(6)]
        tiles[2] = np.empty(0, np.uint8)
        cpu, gpu = pair(MOVED)
        found = gpu(tiles, range(6))
        assert_same(cpu(tiles, range(6)), found, 1e-6)
        assert not found[2].any()
        assert gpu([], []).is_cuda

    def test_encoded(self) -> None:
        """JPEGs are decoded by nvJPEG, whose inverse DCT rounds otherwise: up to three levels of 255."""
        files = [encode(picture(60, 70, seed=k), kind) for k, kind in enumerate(("PNG", "TIFF", "JPEG") * 2)]
        cpu, gpu = pair(ImageTransform(random_crop=(20, 30), horizontal_flip=0.5))
        assert_same(cpu(files, range(6)), gpu(files, range(6)), 3 / 255)

    def test_outputs_stay_while_others_are_made(self) -> None:
        tiles = np.random.default_rng(0).integers(0, 256, (64, 3, 96, 96), dtype=np.uint8)
        _, gpu = pair(MOVED)
        first = gpu(tiles, range(64))
        kept = first.clone()
        for epoch in range(20):
            gpu(np.zeros_like(tiles), range(64), epoch)
        assert torch.equal(first, kept)

    def test_on_a_stream_of_the_callers(self) -> None:
        tiles = np.random.default_rng(0).integers(0, 256, (64, 3, 96, 96), dtype=np.uint8)
        cpu, gpu = pair(MOVED)
        stream = torch.cuda.Stream()
        for epoch in range(10):
            with torch.cuda.stream(stream):
                doubled = gpu(tiles, range(64), epoch) * 2
            stream.synchronize()
            assert_same(cpu(tiles, range(64), epoch) * 2, doubled, 1e-6)
