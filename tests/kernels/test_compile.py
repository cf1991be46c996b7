"""Every kernel file compiles for the GPUs we name, alone, without spills, within its checked-in registers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hbx_gpu._engine.device import sources
from tests.kernels import nvrtc, registers

FILES = [path.name for path in sources.kernel_files()]


@pytest.fixture(scope="module")
def nvrtc_version() -> str:
    """Version of NVRTC; without it tests are skipped, with HBX_REQUIRE_NVRTC=1 they fail."""
    try:
        return nvrtc.version()
    except nvrtc.NvrtcMissing as missing:
        if os.environ.get("HBX_REQUIRE_NVRTC") == "1":
            pytest.fail(f"HBX_REQUIRE_NVRTC=1, but {missing}")
        pytest.skip(str(missing))


def over_budget(used: dict[str, nvrtc.Usage], arch: str, nvrtc_version: str) -> list[str]:
    """Sentences on kernels that spill, or use more than the table says."""
    table = registers.read()
    # Another compiler may allot a few registers differently; a GPU hands them out by eights.
    slack = 0 if table["nvrtc"] == nvrtc_version else 8
    complaints = []
    for kernel, now in used.items():
        if now.spill_stores or now.spill_loads:
            complaints.append(f"{kernel} spills: {now.spill_stores} bytes stored, {now.spill_loads} loaded")
        budget = table["kernels"].get(kernel, {}).get(arch)
        if budget is None:
            complaints.append(f"{kernel} is not in the table; run python -m tests.kernels.registers")
            continue
        if now.registers > budget["registers"] + slack:
            complaints.append(
                f"{kernel} uses {now.registers} registers; the table says {budget['registers']}"
            )
        if now.shared > budget["shared"]:
            complaints.append(
                f"{kernel} has {now.shared} bytes of shared memory; the table says {budget['shared']}"
            )
    return complaints


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("name", FILES)
def test_nvrtc(name: str, arch: str, nvrtc_version: str) -> None:
    cubin, log = nvrtc.compile_text(sources.source(name), name, arch)
    assert cubin[:4] == b"\x7fELF"
    assert "warning" not in log
    used = nvrtc.usage(log)
    assert sorted(used) == sorted(sources.kernels_in(sources.kernels_folder() / name))
    assert over_budget(used, arch, nvrtc_version) == []


def test_table_names_only_kernels_there_are() -> None:
    assert set(registers.read()["kernels"]) == set(sources.kernel_names())


@pytest.mark.parametrize("name", FILES)
def test_nvcc(name: str, tmp_path: Path) -> None:
    """Alone, with includes found beside it: what somebody does who takes one file elsewhere.

    To PTX only; how it assembles is tested with NVRTC above.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = sources.kernels_folder()
    output = str(tmp_path / "out.ptx")
    command = ["nvcc", "-ptx", "-arch=sm_90", "-I", str(folder), str(folder / name), "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* in, float* out) {
    float x[96];
#pragma unroll
    for (int k = 0; k < 96; ++k) x[k] = in[k * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 96; ++k) out[k * 1024 + threadIdx.x] = x[k] * x[95 - k];
}
"""


def test_spills_are_seen(nvrtc_version: str) -> None:
    used = nvrtc.usage(nvrtc.compile_text(SPILLING, "spills.cu", "sm_90")[1])
    complaints = over_budget(used, "sm_90", nvrtc_version)
    assert complaints[0].startswith("spills spills:")
    assert "not in the table" in complaints[1]


def test_growth_is_seen(nvrtc_version: str) -> None:
    kernel, row = next(iter(registers.read()["kernels"].items()))
    budget = row["sm_90"]
    grown = nvrtc.Usage(budget["registers"] + 9, budget["shared"] + 4, 0, 0, 0)
    assert len(over_budget({kernel: grown}, "sm_90", nvrtc_version)) == 2
    same = nvrtc.Usage(budget["registers"], budget["shared"], 0, 0, 0)
    assert over_budget({kernel: same}, "sm_90", nvrtc_version) == []


@pytest.mark.usefixtures("nvrtc_version")
def test_a_text_that_does_not_compile_names_file_and_line() -> None:
    text = sources.source("hbx.cuh") + '#line 7 "mine.cu"\nHBX_KERNEL broken() { nothing(); }\n'
    with pytest.raises(nvrtc.CompilationFailed, match=r"mine\.cu\(7\)"):
        nvrtc.compile_text(text, "mine.cu", "sm_90")
