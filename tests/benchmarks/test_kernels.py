"""The kernel benchmark without a GPU: its data, references and report, at toy size on the emulation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import kernel_cases, kernels
from tests.emulation import EmulatedLauncher
from tests.kernels.conftest import emulated

TOY = [
    "--cells", "14", "--genes", "150", "--density", "0.2", "--chunk", "256", "--batch-sizes", "14", "5",
    "--repeat", "2", "--cold-bytes", "1", "--block", "64",
]  # fmt: skip


class EmulatedDevice:
    """A device of the benchmark in host memory."""

    max_shared = 4096

    def __init__(self, launcher: EmulatedLauncher) -> None:
        self._launcher = launcher

    def array(self, host: np.ndarray) -> np.ndarray:
        return host.reshape(-1).view(np.uint8).copy()

    def empty(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, 0xA7, np.uint8)

    def address(self, memory: np.ndarray) -> int:
        return int(memory.ctypes.data)

    def host(self, memory: np.ndarray) -> np.ndarray:
        return memory.copy()

    def poison(self, memory: np.ndarray) -> None:
        memory[:] = 0xA7

    def launch(self, kernel: str, grid: int, block: int, args: Sequence[Any], shared: int = 0) -> None:
        self._launcher.launch(kernel, grid, block, list(args), shared)

    def seconds(self, run: Callable[[int], None], repeat: int) -> list[float]:
        times = []
        for k in range(repeat):
            begin = time.perf_counter()
            run(k)
            times.append(time.perf_counter() - begin)
        return times

    def copying(self, nbytes: int, _: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
        target, origin = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        return lambda _: np.copyto(target, origin), lambda _: target.fill(0)

    def resources(self, _: kernel_cases.Case) -> dict[str, Any]:
        return {"registers": 0, "blocks_per_processor": 1}

    def free(self) -> None:
        pass


@pytest.fixture
def device() -> EmulatedDevice:
    """In one thread order: the kernels' own tests run in others."""
    return EmulatedDevice(emulated("forward"))


def test_every_case_passes_its_check(device: EmulatedDevice, tmp_path: Path) -> None:
    options = kernels.parse([*TOY, "--tile-bytes", "0", "256"])
    results = kernels.run_all(device, options)
    assert [result for result in results if "error" in result] == []
    names = {result["case"] for result in results}
    dense = {f"{kernel}_{kind}" for kernel in ("rowpack_dense", "densify") for kind in ("f32", "f16", "bf16")}
    assert names == {"rowpack_csr", "gather_pieces", "bitpacking_decode_u32", "sort_rows"} | dense | {
        f"{name} normalize log1p" for name in dense
    }
    assert {result["data"] for result in results} == {"uniform", "realistic"}
    text = kernels.write(tmp_path, {"gpu": "none", "versions": {"numpy": "2"}}, options, results)
    assert text == (tmp_path / "kernels.txt").read_text()
    assert "rowpack_dense_bf16 normalize log1p" in text
    saved = json.loads((tmp_path / "kernels.json").read_text())
    assert len(saved["results"]) == len(results)
    for result in saved["results"]:
        moved = result["read"] + result["written"]
        assert result["moved_gb_per_s"] == pytest.approx(moved / result["seconds"]["median"] / 1e9)
        assert result["floor_seconds"] / result["seconds"]["median"] == pytest.approx(result["share_of_copy"])


@pytest.mark.parametrize("case", ["rowpack_dense", "rowpack_csr", "bitpacking", "gather", "sort", "densify"])
def test_wrong_results_are_told(device: EmulatedDevice, case: str) -> None:
    """The reference is given other counts than the kernels: no case may pass."""
    bench = kernel_cases.Bench(device, kernel_cases.draw("uniform", 6, 150, 0.2), 150, chunk=256)
    bench.bitpacking(kernel_cases.Knobs()).check()
    bench.counts.counts[bench.counts.indptr[3]] += 100
    options = kernels.parse([*TOY, "--cases", case, "--batch-sizes", "6"])
    batch = kernel_cases.cut(bench.counts, np.arange(6), 256)
    ceiling = kernels.Ceiling(device, 1, 1)
    makers = list(kernels.cases(bench, batch, options))
    assert makers
    for make in makers:
        made = make()
        result = {"data": "uniform", **kernels.measure(device, made, ceiling, 1)}
        # densify and sort are fed from the same counts, so their results follow them.
        assert ("error" in result) == (case not in ("densify", "sort")), made.name
        assert len(kernels.line(result)) == len(kernels.HEADER)


def test_outputs_that_a_kernel_leaves_are_told(device: EmulatedDevice) -> None:
    bench = kernel_cases.Bench(device, kernel_cases.draw("uniform", 6, 150, 0.2), 150, chunk=256)
    batch = kernel_cases.cut(bench.counts, np.arange(6), 256)
    device.launch = lambda *_: None  # type: ignore[method-assign]
    knobs = kernel_cases.Knobs(cold_bytes=1)
    for made in (
        bench.rowpack_dense(batch, "f32", False, knobs),
        bench.rowpack_csr(batch, knobs),
        bench.densify(batch, "bf16", True, knobs),
        bench.bitpacking(knobs),
        bench.sort(batch, knobs),
    ):
        with pytest.raises(AssertionError):
            made.check()


@pytest.mark.parametrize("name", kernel_cases.DATA)
def test_data_look_like_cells(name: str) -> None:
    counts = kernel_cases.draw(name, 40, 2000, 0.07)
    lengths = np.diff(counts.indptr)
    assert len(lengths) == 40
    assert counts.indptr[-1] == len(counts.indices) == len(counts.counts)
    assert 0.04 < lengths.mean() / 2000 < 0.12
    assert counts.counts.min() >= 1
    for begin, end in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        assert (np.diff(counts.indices[begin:end]) > 0).all()
    again = kernel_cases.draw(name, 40, 2000, 0.07)
    np.testing.assert_array_equal(counts.counts, again.counts)


def test_rows_are_cut_at_the_borders_of_chunks() -> None:
    counts = kernel_cases.draw("realistic", 30, 400, 0.2, seed=3)
    rows = np.array([7, 0, 29, 7])
    batch = kernel_cases.cut(counts, rows, 16)
    found = np.concatenate([np.arange(b, b + c) for b, c in zip(batch.begin, batch.count, strict=True)])
    expected = np.concatenate([np.arange(counts.indptr[r], counts.indptr[r + 1]) for r in rows])
    np.testing.assert_array_equal(found, expected)
    assert (batch.begin // 16 == (batch.begin + batch.count - 1) // 16).all()
    np.testing.assert_array_equal(batch.out, np.cumsum(batch.count) - batch.count)


def test_without_a_gpu_one_line_and_a_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not kernels.missing():
        pytest.skip("there is a GPU")
    assert kernels.main(["--out", str(tmp_path)]) == kernels.MISSING == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert kernels.missing() in printed.err
