"""What hbx-gpu doctor says about machines of every kind, and about this one."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest

from hbx_gpu import cli
from hbx_gpu._devices import cores
from hbx_gpu._doctor.diagnosis import CUDA, INSTALL_GPU, INSTALL_TORCH, choices, problems, report
from hbx_gpu._doctor.facts import Facts, Gpu, Package, look

ON_CPU: Any = Facts(
    hbx_gpu="0.1.0",
    python="3.11.7",
    system="Linux 6.1",
    cpu="Some processor",
    cores=2,
    memory=24 << 30,
    free=20 << 30,
    cached=3 << 30,
    packages={"torch": Package("2.13.0+cpu"), "DALI": Package("2.4.0", CUDA), "numba": Package("0.61")},
    driver="",
    gpus=(),
    gpudirect=False,
)
OF_CUDA = {name: Package("1.0", CUDA) for name in ("torch", "cupy", "DALI", "kvikio", "nvCOMP")}
ON_GPU = replace(
    ON_CPU, driver="580.65.06", gpus=(Gpu("H200", 141 << 30, "9.0"),), packages=OF_CUDA, gpudirect=True
)


def chosen(facts: Facts) -> dict[str, str]:
    return {choice.option: choice.chosen for choice in choices(facts)}


def test_a_machine_without_a_gpu_is_well() -> None:
    assert problems(ON_CPU) == []
    assert chosen(ON_CPU) == {"device": "cpu", "executor": "dali", "io": "mmap or pinned", "decode": "host"}
    text = report(ON_CPU)
    assert "24.0 GiB, 20.0 free, 3.0 in the page cache" in text
    assert "no NVIDIA driver is loaded" in text
    assert "2.13.0+cpu, without CUDA" in text
    assert text.endswith("Nothing needs to be mended.")


def test_a_machine_with_everything_is_well() -> None:
    assert problems(ON_GPU) == []
    found = chosen(ON_GPU)
    assert found["device"] == "cuda"
    assert found["decode"] == "nvCOMP"
    assert found["io"] == "mmap, pinned or kvikio"
    assert "the module of GPUDirect Storage is loaded" in report(ON_GPU)


@pytest.mark.parametrize(
    ("change", "what", "mend"),
    [
        ({"packages": {}}, "torch is not installed", "hbx_gpu[torch]"),
        ({"packages": {"torch": Package("2.13.0")}, "gpus": ()}, "without CUDA", INSTALL_TORCH),
        (
            {"driver": "535.183.01", "gpus": ()},
            "needs driver 580 or newer; this one is 535.183.01",
            "a driver of branch 580",
        ),
        ({"gpus": ()}, "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (
            {"packages": OF_CUDA | {"torch": Package("2.13.0", 12)}},
            "built for CUDA 13, torch 2.13.0 for CUDA 12",
            INSTALL_TORCH,
        ),
        (
            {"packages": OF_CUDA | {"cupy": Package("14.0", 12)}},
            "cupy 14.0 is built for CUDA 12, torch 1.0 for CUDA 13",
            INSTALL_GPU,
        ),
        (
            {"packages": {"torch": Package("2.13.0", CUDA)}},
            "cupy, DALI, kvikio and nvCOMP are not installed; without cupy nothing is decoded",
            INSTALL_GPU,
        ),
        (
            {"packages": OF_CUDA | {"cupy": Package("14.0", CUDA, "ImportError: libnvrtc.so.13")}},
            "cupy 14.0 is installed and cannot be imported (ImportError: libnvrtc.so.13)",
            "cupy-cuda13x",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_mends_it(change: dict[str, Any], what: str, mend: str) -> None:
    found = problems(replace(ON_GPU, **change))
    assert any(what in problem.what and mend in problem.mend for problem in found), found
    assert what in report(replace(ON_GPU, **change))


def test_an_older_release_of_cuda_needs_an_older_driver_only() -> None:
    old = replace(ON_GPU, driver="535.183.01", packages={n: replace(p, cuda=12) for n, p in OF_CUDA.items()})
    assert problems(old) == []


def test_without_cupy_a_gpu_is_not_used() -> None:
    without = replace(ON_GPU, packages={n: p for n, p in OF_CUDA.items() if n != "cupy"})
    assert chosen(without)["device"] == "cpu"
    assert chosen(without)["decode"] == "host"


def test_broken_dali_is_not_chosen() -> None:
    broken = replace(ON_CPU, packages={**ON_CPU.packages, "DALI": Package("2.4.0", CUDA, "ImportError: x")})
    assert chosen(broken)["executor"] == "direct"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    facts = look()
    assert facts.cores == cores()
    assert facts.packages["numba"].version == metadata.version("numba")
    assert cli.main(["doctor"]) == int(bool(problems(facts)))
    out = capsys.readouterr().out
    assert f"this process may use {facts.cores} cores" in out
    assert "device=auto" in out
    assert len(out.splitlines()) <= 40
