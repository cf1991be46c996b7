"""The pytest plugin of the rehearsal: installs the doubles, and skips in words what has none."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import pytest

from hbx_gpu._engine.device import cuda
from hbx_gpu._engine.device.backend import Streams
from hbx_gpu._engine.device.nvcomp import Alignments
from tests.emulation.decompressor import CpuDecompressor
from tests.rehearsal import host_ops
from tests.rehearsal.runtime import cudart

DALI = "DALI links CUDA's runtime statically and asks the driver, of which the rehearsal has none"
KVIKIO = "kvikio reads files with its own CUDA runtime, of which the rehearsal has none"
# (part of a test's name, why it is skipped)
WITHOUT_DOUBLE = (
    ("tests/test_executors.py::test_batches_of_a_gpu", DALI),
    ("tests/test_pipeline.py::test_noise_on_a_gpu", DALI),
    ("tests/images/", DALI),
    ("real_kvikio", KVIKIO),
)

_KEPT: list[object] = []  # the operators of torch are replaced as long as this lives


class NvcompDouble:
    """`nvcomp.Library`, which decompresses on the stream it is given: decoders of the CPU, called later."""

    version = (6, 0, 0)

    def __init__(self) -> None:
        self._decoder = CpuDecompressor()
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._run)
        self._numbers = itertools.count(1)
        self._ordered: dict[int, tuple[str, Streams]] = {}

    def alignments(self, algorithm: str) -> Alignments:  # noqa: ARG002
        return Alignments(8, 1, 8)

    def temp_bytes(
        self,
        algorithm: str,  # noqa: ARG002
        n: int,
        max_bytes: int,  # noqa: ARG002
        total_bytes: int,
        *,
        stream: int = 0,  # noqa: ARG002
    ) -> int:
        return 3 * total_bytes + 64 * n

    def decompress(
        self, algorithm: str, streams: Streams, first: int, n: int, temp: tuple[int, int], stream: int
    ) -> None:
        assert temp[1] == 0 or temp[0] % 256 == 0
        part = Streams(
            sources=streams.sources + 8 * first,
            source_bytes=streams.source_bytes + 8 * first,
            targets=streams.targets + 8 * first,
            target_bytes=streams.target_bytes + 8 * first,
            actual=streams.actual + 8 * first,
            states=streams.states + 4 * first,
            sizes=streams.sizes[first : first + n].copy(),
        )
        number = next(self._numbers)
        self._ordered[number] = algorithm, part
        status = cudart().cudaLaunchHostFunc(ctypes.c_void_p(stream), self._function, ctypes.c_void_p(number))
        assert status == 0

    def _run(self, number: int) -> None:
        self._decoder.decompress(*self._ordered.pop(number))


def pytest_configure() -> None:
    """Install the doubles before a test is imported."""
    _KEPT.append(host_ops.install())
    double = NvcompDouble()
    vars(cuda)["find_library"] = lambda: double


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what cannot be rehearsed."""
    for item in items:
        for part, reason in WITHOUT_DOUBLE:
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"not rehearsed: {reason}"))
