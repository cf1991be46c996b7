"""The shim itself: what intrinsics return, and that planted bugs are caught while their sound twins pass."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emulation import EmulatedLauncher, EmulationError, KernelDoesNotCompile, sanitized

PLANTED = Path(__file__).resolve().parent / "planted"
FILES = sorted(PLANTED.glob("*.cu"))
ORDERS = ("forward", "reverse", "random:7", "random:8")
U32 = np.uint32

pytestmark = pytest.mark.usefixtures("gxx")


@pytest.fixture(params=ORDERS)
def planted(request: pytest.FixtureRequest) -> EmulatedLauncher:
    return EmulatedLauncher(request.param, watch="", files=FILES)


def numbers(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, n, dtype=U32)


# --- sound kernels -------------------------------------------------------------------------------------


def test_blocks_reverse_their_numbers(planted: EmulatedLauncher) -> None:
    n = 1000
    data, out = numbers(1024), np.full(n, 7, U32)
    planted.run("reverse_block", 4, 256, [data[:n].copy(), out, U32(n)])
    data[n:] = 0
    np.testing.assert_array_equal(out, data.reshape(4, 256)[:, ::-1].ravel()[:n])


@pytest.mark.parametrize("size", [1, 31, 100, 5000])
def test_dynamic_shared_memory(planted: EmulatedLauncher, size: int) -> None:
    data, out = numbers(size), np.empty(size, U32)
    planted.run("reverse_dynamic", 1, 64, [data, out, U32(size)], shared=4 * size)
    np.testing.assert_array_equal(out, data[::-1])


def test_shared_arrays_of_templates(planted: EmulatedLauncher) -> None:
    whole, real = numbers(5000), np.arange(5000, dtype=np.float64) / 8
    sums, real_sums = np.zeros(1, np.uint64), np.zeros(1)
    planted.run("sum_both", 3, 96, [whole, real, U32(5000), sums, real_sums])
    assert sums[0] == whole.sum()
    assert real_sums[0] == real.sum()


def test_same_launch_twice_is_the_same(planted: EmulatedLauncher) -> None:
    def places() -> np.ndarray:
        out = np.zeros(96, U32)
        planted.run("spin", 1, 96, [out, U32(5)])
        return out

    np.testing.assert_array_equal(places(), places())
    assert planted.collectives == 5 * 96


def test_launches_of_many_threads_take_turns(planted: EmulatedLauncher) -> None:
    def block(seed: int) -> bool:
        data, out = numbers(256, seed), np.zeros(256, U32)
        planted.run("reverse_block", 1, 256, [data, out, U32(256)])
        return bool((out == data[::-1]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(block, range(40)))


def test_shuffles(planted: EmulatedLauncher) -> None:
    x, out = numbers(32), np.zeros((8, 32), U32)
    planted.run("shuffles", 1, 32, [x, out])
    lane = np.arange(32)
    low = lane & ~7
    places = [
        lane * 7 % 32,
        np.where(lane >= 3, lane - 3, lane),
        np.where(lane + 5 < 32, lane + 5, lane),
        lane ^ 9,
        low + 3,
        np.where(lane - low >= 2, lane - 2, lane),
        np.where(lane - low < 6, lane + 2, lane),
    ]
    for row, place in zip(out, places, strict=False):
        np.testing.assert_array_equal(row, x[place])
    np.testing.assert_array_equal(out[7], np.cumsum(x))


def test_votes_and_reductions(planted: EmulatedLauncher) -> None:
    x, out = numbers(32), np.zeros((9, 32), U32)
    planted.run("votes", 1, 32, [x, out])
    expected = [
        sum(int(bit) << k for k, bit in enumerate(x & 1)),
        int((x == 3).any()) | 2,
        x.sum(),
        x.min(),
        x.max(),
        np.bitwise_or.reduce(x),
        np.bitwise_and.reduce(x),
    ]
    for row, value in zip(out, expected, strict=False):
        np.testing.assert_array_equal(row, np.full(32, value, U32))
    for lane in range(32):
        assert out[7, lane] == sum(1 << k for k in range(32) if x[k] % 5 == x[lane] % 5)
    np.testing.assert_array_equal(out[8].view(np.int32), np.full(32, x.astype(int).min() - 50))


def test_masks_of_half_a_warp(planted: EmulatedLauncher) -> None:
    x, out = numbers(32), np.zeros((2, 32), U32)
    planted.run("halves", 1, 32, [x, out])
    np.testing.assert_array_equal(out[0], np.repeat([x[:16].sum(), x[16:].sum()], 16))
    np.testing.assert_array_equal(out[1], out[0][::-1])


def test_shuffles_of_64_bits(planted: EmulatedLauncher) -> None:
    x, y = np.arange(32, dtype=np.uint64) << np.uint64(40), np.arange(32) / 3
    out, real = np.zeros(32, np.uint64), np.zeros(32)
    planted.run("wide_shuffle", 1, 32, [x, y, out, real])
    np.testing.assert_array_equal(out, x[np.arange(32) ^ 1])
    np.testing.assert_array_equal(real, y[np.maximum(np.arange(32) - 1, 0)])


def test_bits(planted: EmulatedLauncher) -> None:
    n = 70
    x = np.random.default_rng(1).integers(0, 2**32, n, dtype=np.uint64).astype(U32) & U32(0x7F7FFFFF)
    x[:2] = [0, 1]
    out = np.zeros((9, n), U32)
    planted.run("bits", 2, 64, [x, out, U32(n)])
    for k in range(n):
        a, b = int(x[k]), int(x[(k + 1) % n])
        both, shift = b << 32 | a, k % 32
        text = f"{a:032b}"
        low = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        assert [int(value) for value in out[:, k]] == [
            text.count("1"),
            32 - text.rindex("1") if a else 0,
            text.index("1") if a else 32,
            int(text[::-1], 2),
            both >> shift & 0xFFFFFFFF,
            (both << shift) >> 32 & 0xFFFFFFFF,
            int.from_bytes(low[1::2], "little"),
            a,
            a * b >> 32,
        ]


def test_atomics(planted: EmulatedLauncher) -> None:
    n = 3 * 64
    u = np.array([0, 0, 2**32 - 1, 0, 999, 11, 0, 5], U32)
    i, w = np.zeros(2, np.int32), np.zeros(2, np.uint64)
    f, d = np.zeros(1, np.float32), np.zeros(1)
    planted.run("atomics", 3, 64, [u, i, w, f, d])
    assert u.tolist()[:5] == [n, 2**32 - 1, 0xFFFF0000, n - 1, 0]
    assert 100 <= u[5] < 100 + n  # the first thread wins, whichever it is
    assert u.tolist()[6:] == [5, 70]
    assert i.tolist() == [-(n - 1), -n]
    assert w.tolist() == [(n * (n - 1) // 2) << 32, (n - 1) << 33]
    assert (f[0], d[0]) == (n / 2, n / 4)


def test_three_dimensions(planted: EmulatedLauncher) -> None:
    out = np.zeros((2, 3, 4, 3, 2, 5), U32)
    planted.run("places", (4, 3, 2), (5, 2, 3), [out])
    for place in np.ndindex(out.shape):
        expected = sum(part << shift for part, shift in zip(place, (20, 16, 12, 8, 4, 0), strict=True))
        assert out[place] == expected


def test_block_that_is_no_multiple_of_a_warp(planted: EmulatedLauncher) -> None:
    out = np.zeros(46, U32)
    planted.run("partial_warp", 1, 45, [out])
    assert out[:44].tolist() == [*range(1, 32), 31, *range(33, 45)]
    assert out[44] == 0xDEADBEEF  # its neighbor does not exist
    assert out[45] == 15


# --- planted bugs --------------------------------------------------------------------------------------


def outcomes(kernel: str, grid: int, args: Any) -> set[bytes]:
    """Distinct results of a kernel over all orders; `args(out)` are its arguments."""
    found = set()
    for order in ORDERS:
        out = np.zeros(1024, U32)
        EmulatedLauncher(order, watch="", files=FILES).run(kernel, grid, 256, args(out))
        found.add(out.tobytes())
    return found


@pytest.mark.parametrize(("kernel", "grid"), [("missing_barrier", 4), ("missing_second_barrier", 1)])
def test_a_missing_barrier_shows_in_the_order_of_threads(kernel: str, grid: int) -> None:
    data = numbers(1024)
    assert len(outcomes("reverse_block", 4, lambda out: [data, out, U32(1024)])) == 1
    assert len(outcomes(kernel, grid, lambda out: [data, out, U32(1024)])) > 1


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        (
            "two_barriers",
            ["threads 0-31 wait in __syncthreads at", "wrong.cu:35", "threads 32-63 wait in", "wrong.cu:37"],
        ),
        ("divergent_shuffle", ["wait in __shfl_sync", "mask 0xffffffff", "wait in __syncthreads"]),
        ("mixed_operations", ["lanes meet at different places", "__ballot_sync", "__any_sync"]),
        ("foreign_mask", ["leaves out the lane", "waits in __shfl_sync", "0x0000ffff"]),
        ("trapped", ["thread 5 at", "__trap"]),
    ],
)
def test_divergence_is_reported(planted: EmulatedLauncher, kernel: str, report: list[str]) -> None:
    out = np.zeros(64, U32)
    with pytest.raises(EmulationError, match=kernel) as caught:
        planted.run(kernel, 1, 64, [out])
    for part in (planted.order, "in block (0, 0, 0)", *report):
        assert part in str(caught.value)


def test_threads_that_leave_before_a_barrier_are_reported(planted: EmulatedLauncher) -> None:
    data, out = numbers(300), np.zeros(300, U32)
    planted.run("left_before_barrier", 1, 256, [data, out, U32(256)])
    np.testing.assert_array_equal(out[:256], data[np.arange(256) ^ 1])
    with pytest.raises(EmulationError, match="threads 44-255 left the kernel"):
        planted.run("left_before_barrier", 2, 256, [data, out, U32(300)])
    # The launcher is as good as new.
    test_blocks_reverse_their_numbers(planted)


def test_what_was_not_written_in_shared_memory_shows(planted: EmulatedLauncher) -> None:
    data, out = numbers(256), np.zeros(256, U32)
    planted.run("reverse_block", 1, 256, [data, out, U32(256)])  # leaves numbers behind
    planted.run("uninitialized_shared", 1, 256, [data, out, U32(200)])
    np.testing.assert_array_equal(out[:56], np.full(56, 0xA5A5A5A5, U32))
    np.testing.assert_array_equal(out[56:], data[:200][::-1])
    planted.run("uninitialized_dynamic", 2, 256, [out], shared=1024)
    np.testing.assert_array_equal(out, np.full(256, 0xA5A5A5A5, U32))


RUN = """
import sys
import numpy as np
from pathlib import Path
from tests.emulation import EmulatedLauncher, EmulationError
files = sorted(Path(sys.argv[1]).glob("*.cu"))
launcher = EmulatedLauncher(sys.argv[2], watch="accesses", files=files)
data, out, view = np.arange(1024, dtype=np.uint32), np.zeros(64, np.uint32), np.zeros(100, np.uint32)[:64]
big, u32 = np.zeros(1024, np.uint32), np.uint32
try:
    launcher.run("two_barriers", 1, 64, [out])
except EmulationError:
    pass
launcher.run("reverse_block", 4, 256, [data, big, u32(1024)])
launcher.run("reverse_dynamic", 1, 64, [data, big, u32(777)], 777 * 4)
launcher.run("shared_overrun", 1, 32, [out, u32(40)])
launcher.run("dynamic_overrun", 1, 32, [out, u32(40)], 160)
launcher.run("global_overrun", 1, 64, [data, out, u32(1023)])
launcher.run("global_write_overrun", 1, 64, [view, u32(63)])
launcher.run("wide_shift", 1, 64, [out, u32(31)])
launcher.run("misaligned_vector", 1, 16, [data, out, u32(4)])
assert view[63] == 63, "results must come back from stand-ins"
print("sound so far", flush=True)
if len(sys.argv) > 3:
    launcher.run(sys.argv[3], 1, 64, eval(sys.argv[4]), int(sys.argv[5]))
print("survived", flush=True)
"""


def sanitized_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(PLANTED), *arguments],
        cwd=sanitized.ROOT,
        env=sanitized.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("order", ["forward", "random:3"])
def test_sound_kernels_pass_the_sanitizers(order: str) -> None:
    done = sanitized_run(order)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["sound so far", "survived"]
    assert "ERROR" not in done.stderr


@pytest.mark.parametrize(
    ("kernel", "args", "shared", "report"),
    [
        ("global_overrun", "[data[:16], out, u32(16)]", 0, "heap-buffer-overflow"),
        ("global_write_overrun", "[view[:10], u32(10)]", 0, "heap-buffer-overflow"),
        ("shared_overrun", "[out, u32(41)]", 0, "global-buffer-overflow"),
        ("dynamic_overrun", "[out, u32(41)]", 160, "heap-buffer-overflow"),
        ("uninitialized_dynamic", "[out]", 0, "heap-buffer-overflow"),
        ("wide_shift", "[out, u32(32)]", 0, "shift exponent 32 is too large"),
        ("misaligned_vector", "[data, out, u32(1)]", 0, "misaligned address"),
    ],
)
def test_sanitizers_catch(kernel: str, args: str, shared: int, report: str) -> None:
    done = sanitized_run("forward", kernel, args, str(shared))
    assert "sound so far" in done.stdout, done.stderr
    assert "survived" not in done.stdout
    assert done.returncode != 0
    assert report in done.stderr
    assert "wrong.cu" in done.stderr


# --- arguments -----------------------------------------------------------------------------------------

WHOLE: list[Any] = [
    np.array([9], np.uint8),
    np.uint64(3 << 40),
    np.zeros(6, np.int32),
    np.float32(2.5),
    np.float64(1.25),
    np.int64(-(1 << 40)),
    np.uint8(200),
    None,
]


def test_every_kind_of_parameter(planted: EmulatedLauncher) -> None:
    planted.run("every_parameter", 1, 1, WHOLE)
    assert WHOLE[2].tolist() == [9, 3, 135, -1, 200, 1]


def test_tensors_and_addresses(planted: EmulatedLauncher) -> None:
    torch = pytest.importorskip("torch")
    data, out = numbers(256), torch.zeros(256, dtype=torch.int32)
    planted.run("reverse_block", 1, 256, [np.uint64(planted.address(data)), out, U32(256)])
    np.testing.assert_array_equal(out.numpy(), data[::-1])


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, np.uint32(3), "argument 1: expected np.uint64, found uint32"),
        (1, np.int64(3), "expected np.uint64"),
        (1, 3, "expected np.uint64, found int"),
        (3, np.float64(2.5), "argument 3: expected np.float32"),
        (5, np.uint64(1), "expected np.int64"),
        (6, np.uint32(1), "expected np.uint8"),
        (2, np.zeros(6, np.int64), "argument 2: the kernel sees elements of 4 bytes, found 8 bytes"),
        (2, [1, 2], "expected an array, a tensor, None or np.uint64, found list"),
        (2, 5, "found int"),
    ],
)
def test_arguments_of_the_wrong_type(
    planted: EmulatedLauncher, place: int, wrong: object, message: str
) -> None:
    args = list(WHOLE)
    args[place] = wrong
    with pytest.raises(TypeError, match=message):
        planted.run("every_parameter", 1, 1, args)


def test_number_of_arguments(planted: EmulatedLauncher) -> None:
    with pytest.raises(TypeError, match="every_parameter takes 8 arguments; 7 given"):
        planted.run("every_parameter", 1, 1, WHOLE[:-1])


def test_memory_that_is_not_contiguous_or_not_writable(planted: EmulatedLauncher) -> None:
    data, out = numbers(512), np.zeros(256, U32)
    with pytest.raises(ValueError, match="contiguous"):
        planted.run("reverse_block", 1, 256, [data[::2], out, U32(256)])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        planted.run("reverse_block", 1, 256, [data[:256], out, U32(256)])
    planted.run("reverse_block", 1, 256, [out, data[:256], U32(256)])


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        (0, 32, 0, "grid is 0"),
        (1, 1025, 0, "block is 1025"),
        (1, (64, 32), 0, "block is"),
        (1, 32, 300_000, "shared is 300000"),
    ],
)
def test_launches_that_no_gpu_takes(
    planted: EmulatedLauncher, grid: Any, block: Any, shared: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        planted.run("spin", grid, block, [np.zeros(64, U32), U32(0)], shared)


def test_unknown_names(planted: EmulatedLauncher) -> None:
    with pytest.raises(ValueError, match=r"There is no kernel spinn; there are: .*spin"):
        planted.run("spinn", 1, 32, [])
    for order in ("backward", "random", "random:x", "forward:1"):
        with pytest.raises(ValueError, match="expected 'forward', 'reverse' or 'random:SEED'"):
            EmulatedLauncher(order)


def test_a_kernel_that_does_not_compile_says_where(tmp_path: Path) -> None:
    file = tmp_path / "broken.cu"
    file.write_text('#include "hbx.cuh"\nHBX_KERNEL broken(u64* out) {\n    atomicAdd((i64*)out, 1);\n}\n')
    with pytest.raises(KernelDoesNotCompile, match=r"broken\.cu:3"):
        EmulatedLauncher(files=[file]).run("broken", 1, 32, [None])
