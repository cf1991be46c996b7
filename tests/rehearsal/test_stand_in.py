"""The stand-in itself: it does what a GPU would, later, and refuses what a GPU would refuse."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from tests.rehearsal import runtime
from tests.rehearsal.__main__ import main

on_the_stand_in = pytest.mark.skipif(not runtime.rehearsing(), reason="of the stand-in; make rehearse")
OPERATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.cumsum(0),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.t().contiguous(),
    lambda x: x[x > 3],
    lambda x: x.sort(0, descending=True).indices,
    lambda x: torch.zeros_like(x).add_(x, alpha=2),
    lambda x: torch.full_like(x, 7),
    lambda x: torch.arange(9, device=x.device) - 1,
    lambda x: torch.sparse_coo_tensor(x % 3, x[0], (3, 3, 3), check_invariants=False).coalesce().values(),
    lambda x: torch.cat([x, x], out=torch.empty(0, dtype=x.dtype, device=x.device)),
]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_without_a_cuda_build_of_torch_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    assert "make rehearse" in said or "nvidia-cuda-crt" in said


def test_a_suite_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel"]) == 2
    assert "engine" in capsys.readouterr().out


@pytest.mark.gpu
@on_the_stand_in
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_operations_of_torch(number: int) -> None:
    host = torch.arange(12).reshape(3, 4) * 5 % 7
    found = OPERATIONS[number](host.cuda())
    expected = OPERATIONS[number](host)
    assert found.is_cuda
    assert found.dtype == expected.dtype
    assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@on_the_stand_in
def test_a_copy_that_nobody_waits_for_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBX_REHEARSAL_COPY_US", "50000")
    side, event = torch.cuda.Stream(), torch.cuda.Event()
    source = torch.full((4000,), 3, dtype=torch.uint8).pin_memory()
    target = torch.zeros(4000, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        target.copy_(source, non_blocking=True)
        event.record()
    assert not event.query()
    assert ctypes.string_at(target.data_ptr(), 1) == b"\0"
    torch.cuda.current_stream().wait_event(event)
    assert target.cpu().tolist() == [3] * 4000


@pytest.mark.gpu
@on_the_stand_in
def test_a_copy_beyond_a_block_is_refused() -> None:
    status = runtime.cudart().cudaMemcpyAsync(
        ctypes.c_void_p(1 << 40), ctypes.create_string_buffer(8), ctypes.c_size_t(8), 1, ctypes.c_void_p(0)
    )
    assert status == 1  # cudaErrorInvalidValue
    torch.cuda.cudart()
    runtime.cudart().cudaGetLastError()


@pytest.mark.gpu
@on_the_stand_in
def test_a_kernel_on_a_stream_of_another_device_is_refused() -> None:
    import cupy

    from hbx_gpu._engine.device.sources import kernel_names

    stream = torch.cuda.Stream(1)
    kernel = cupy.RawModule(code="", options=(), backend="nvrtc").get_function(next(iter(kernel_names())))
    status = runtime.cudart().standin_launch(
        ctypes.c_void_p(stream.cuda_stream), None, b"", 0, b"", None, 0, b""
    )
    assert status == 400  # cudaErrorInvalidResourceHandle
    assert kernel.max_dynamic_shared_size_bytes == 48 << 10
