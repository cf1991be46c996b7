"""The binding of nvCOMP: the real library is asked what it answers without a driver, stand-ins the rest."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._codecs.containers import ALGORITHMS
from hbx_gpu._engine.device import nvcomp
from hbx_gpu._engine.device.backend import Streams
from hbx_gpu._engine.device.nvcomp import Library, NvcompDecompressor, find_library
from hbx_gpu.errors import DeviceUnavailableError
from tests.emulation.backend import Arena
from tests.emulation.build import CompilerMissing, compiler


@pytest.fixture(scope="module")
def gcc() -> str:
    """Path of the C compiler beside g++."""
    try:
        return compiler()[0].replace("g++", "gcc")
    except CompilerMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def library() -> Library:
    """The installed library; HBX_NVCOMP names another one."""
    try:
        return Library(os.environ["HBX_NVCOMP"]) if "HBX_NVCOMP" in os.environ else find_library()
    except DeviceUnavailableError as missing:
        pytest.skip(str(missing))


def test_version_and_alignments(library: Library) -> None:
    assert library.version[0] in nvcomp.MAJORS
    for algorithm in ALGORITHMS:
        need = library.alignments(algorithm)
        assert need.input in (1, 2, 4, 8, 16)
        assert need.output == 1
        assert need.temp in (1, 8, 256)


def test_scratch(library: Library) -> None:
    """zstd takes a multiple of its output and grows with streams and their length, the others take none."""
    sizes = [(n, size) for n in (1, 256, 4096) for size in (1 << 16, 160 << 10)]
    zstd = [library.temp_bytes("zstd", n, size, n * size) for n, size in sizes]
    for (n, size), nbytes in zip(sizes, zstd, strict=True):
        assert n * size < nbytes < 16 * n * size
    assert library.temp_bytes("lz4", 4096, 1 << 16, 1 << 28) < 1 << 20
    assert library.temp_bytes("deflate", 4096, 1 << 16, 1 << 28) < 1 << 20


def decompressor(library: Any, allocated: list[Any] | None = None) -> NvcompDecompressor:
    def allocate(nbytes: int) -> Any:
        if allocated is not None:
            allocated.append(nbytes)
        return Arena(nbytes)

    def wait() -> None:
        if allocated is not None:
            allocated.append("wait")

    return NvcompDecompressor(library, allocate, wait, 77, contextlib.nullcontext)


def test_calls_keep_to_their_scratch(library: Library) -> None:
    many = np.full(5000, 160 << 10)
    long = np.array([1 << 16, 1 << 16, 200 << 20, 1 << 16])
    for algorithm in ALGORITHMS:
        for sizes in (many, long, many[:1], many[:0]):
            calls = decompressor(library)._calls(algorithm, sizes)
            assert [first for first, _, _ in calls] == np.cumsum([0, *(n for _, n, _ in calls)]).tolist()[:-1]
            assert sum(n for _, n, _ in calls) == len(sizes)
            assert all(nbytes <= nvcomp.MAX_TEMP or n == 1 for _, n, nbytes in calls)
    few = len(decompressor(library)._calls("zstd", many))
    assert 2 * many.sum() / nvcomp.MAX_TEMP < few < 8 * many.sum() / nvcomp.MAX_TEMP
    assert len(decompressor(library)._calls("lz4", many)) == 1


class StandIn:
    """Says what it was asked; zstd takes three times its output."""

    version = (6, 0, 0)

    def __init__(self, *need: int) -> None:
        self.need = nvcomp.Alignments(*(need or (4, 1, 8)))
        self.calls: list[Any] = []

    def alignments(self, algorithm: str) -> nvcomp.Alignments:
        assert algorithm in ALGORITHMS
        return self.need

    def temp_bytes(self, algorithm: str, n: int, longest: int, total: int, *, stream: int) -> int:
        assert longest <= total <= n * longest
        assert stream == 77
        return 3 * n * longest if algorithm == "zstd" else 0

    def decompress(self, *call: Any) -> None:
        self.calls.append(call)


def streams(sizes: list[int]) -> Streams:
    return Streams(1000, 2000, 3000, 4000, 5000, 6000, np.array(sizes))


def test_one_scratch_buffer_is_used_again() -> None:
    library = StandIn()
    allocated: list[Any] = []
    made = decompressor(library, allocated)
    made.decompress("zstd", streams([100, 100]))
    made.decompress("zstd", streams([50]))
    made.decompress("lz4", streams([1 << 30]))
    made.decompress("zstd", streams([nvcomp.MAX_TEMP // 6] * 3))
    # Before it makes way for a larger one, what uses it is waited for.
    assert allocated == [1024, "wait", nvcomp.MAX_TEMP]
    found = [(algorithm, first, n, temp[1], stream) for algorithm, _, first, n, temp, stream in library.calls]
    half = nvcomp.MAX_TEMP // 6 * 3
    assert found == [
        ("zstd", 0, 2, 600, 77), ("zstd", 0, 1, 150, 77), ("lz4", 0, 1, 0, 77),
        ("zstd", 0, 2, 2 * half, 77), ("zstd", 2, 1, half, 77),
    ]  # fmt: skip


@pytest.mark.parametrize("need", [(32, 1, 1), (1, 8, 1), (1, 1, 512)])
def test_alignments_that_staging_does_not_give(need: tuple[int, int, int]) -> None:
    with pytest.raises(DeviceUnavailableError, match="aligned to"):
        decompressor(StandIn(*need))


# A library with nvCOMP's names that writes down how it was called: the arguments, as C sees them.
FAKE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { int backend; char others[60]; } Opts;
uint64_t seen[16];
int nvcompGetProperties(uint32_t* p) { p[0] = VERSION; p[1] = 13000; return 0; }
const char* nvcompGetStatusString(int s) { return s == 17 ? "told so" : "no"; }
#define ALGORITHM(NAME) \\
  int nvcompBatched##NAME##DecompressGetRequiredAlignments(Opts o, size_t* a) { \\
    a[0] = 4; a[1] = 1; a[2] = 8; return o.backend == 2 ? 0 : 17; } \\
  int TEMP(NAME)(size_t n, size_t longest, Opts o, size_t* t, size_t total STREAM) { \\
    seen[0] = n; seen[1] = longest; seen[2] = total; seen[3] = LAST; \\
    for (int k = 0; k < 60; k++) if (o.others[k]) return 17; \\
    *t = 42; return o.backend == 2 ? 0 : 17; } \\
  int nvcompBatched##NAME##DecompressAsync(void* src, void* sb, void* tb, void* actual, size_t n, \\
      void* temp, size_t tempb, void* targets, Opts o, void* states, void* stream) { \\
    void* all[] = {src, sb, tb, actual, (void*)n, temp, (void*)tempb, targets, states, stream}; \\
    memcpy(seen, all, sizeof all); return o.backend == 2 ? (n == 13 ? 17 : 0) : 17; }
ALGORITHM(Zstd) ALGORITHM(LZ4) ALGORITHM(Deflate)
"""
FIVE = ["-DVERSION=5300", "-DTEMP(N)=nvcompBatched##N##DecompressGetTempSizeAsync", "-DSTREAM=", "-DLAST=7"]
SIX = [
    "-DVERSION=6000", "-DTEMP(N)=nvcompBatched##N##DecompressGetTempSize", "-DSTREAM=,void* s",
    "-DLAST=(uint64_t)s",
]  # fmt: skip


def built(folder: Path, gcc: str, options: list[str], text: str = FAKE) -> Path:
    unit, output = folder / "fake.c", folder / f"libnvcomp.so.{len(list(folder.iterdir()))}"
    unit.write_text(text)
    subprocess.run([gcc, "-x", "c", "-shared", "-fPIC", *options, str(unit), "-o", str(output)], check=True)
    return output


@pytest.mark.parametrize(("options", "version", "stream"), [(FIVE, (5, 3, 0), 7), (SIX, (6, 0, 0), 99)])
def test_arguments_arrive_in_both_versions(
    tmp_path: Path, gcc: str, options: list[str], version: tuple[int, ...], stream: int
) -> None:
    path = built(tmp_path, gcc, options)
    library = Library(str(path))
    assert library.version == version
    seen = (ctypes.c_uint64 * 16).in_dll(ctypes.CDLL(str(path)), "seen")
    for algorithm in ALGORITHMS:
        assert library.alignments(algorithm) == nvcomp.Alignments(4, 1, 8)
        assert library.temp_bytes(algorithm, 3, 1 << 33, 1 << 34, stream=99) == 42
        assert list(seen[:4]) == [3, 1 << 33, 1 << 34, stream]
        library.decompress(algorithm, streams([1] * 20), 10, 5, (1 << 40, 42), 88)
        assert list(seen[:10]) == [1080, 2080, 4080, 5080, 5, 1 << 40, 42, 3080, 6040, 88]
        with pytest.raises(RuntimeError, match=r"DecompressAsync failed with status 17: told so"):
            library.decompress(algorithm, streams([1] * 20), 0, 13, (0, 0), 88)


def test_libraries_that_are_refused(tmp_path: Path, gcc: str) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"nvCOMP 4\.2\.1 at .* 5 and 6 have"):
        Library(str(built(tmp_path, gcc, ["-DVERSION=4201", *FIVE[1:]])))
    with pytest.raises(DeviceUnavailableError, match=r"nvCOMP 7\.0\.0"):
        Library(str(built(tmp_path, gcc, ["-DVERSION=7000", *SIX[1:]])))
    with pytest.raises(DeviceUnavailableError, match=r"lacks a function.*GetTempSize"):
        Library(str(built(tmp_path, gcc, ["-DVERSION=6000", *FIVE[1:]])))
    other = "int nothing(void) { return 0; }"
    with pytest.raises(DeviceUnavailableError, match=r"lacks a function.*nvcompGetProperties"):
        Library(str(built(tmp_path, gcc, [], other)))
    with pytest.raises(DeviceUnavailableError, match="cannot be loaded"):
        Library(str(tmp_path / "nowhere.so"))


def test_where_the_library_is_looked_for(tmp_path: Path, gcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def places(*options: list[str]) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        paths = []
        for option in options:
            path = built(folder, gcc, option)
            paths.append(path.rename(folder / f"libnvcomp.so.{option[0][10]}"))
        monkeypatch.setattr(nvcomp, "_packaged", lambda: sorted(paths))

    places(FIVE, SIX)
    assert find_library().version == (6, 0, 0)
    places(FIVE)
    assert find_library().version == (5, 3, 0)
    places(["-DVERSION=4000", *FIVE[1:]])
    with pytest.raises(DeviceUnavailableError, match=r"nvCOMP 4\.0\.0"):
        find_library()
    places()
    monkeypatch.setattr(nvcomp, "MAJORS", (99,))  # what is loaded already is found by its name
    with pytest.raises(DeviceUnavailableError, match=r"not installed.*hbx_gpu\[gpu\]"):
        find_library()
