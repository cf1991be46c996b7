"""Texts of kernels: found, named, and flattened so that a compiler needs no folder of headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbx_gpu._engine.device import sources


def test_every_kernel_is_found_in_its_file() -> None:
    names = sources.kernel_names()
    assert {
        "rowpack_csr",
        "rowpack_dense_f32",
        "bitpacking_decode_u64",
        "gather_pieces",
        "densify_f16",
    } <= set(names)
    for kernel, file in names.items():
        assert f"{kernel}(" in (sources.kernels_folder() / file).read_text()


@pytest.mark.parametrize("path", sources.kernel_files(), ids=lambda path: path.name)
def test_flattened_text_has_each_header_once_and_no_include_of_ours(path: Path) -> None:
    text = sources.source(path.name)
    assert '#include "' not in text
    assert "#pragma once" not in text
    assert text.count("struct HbxPiece {") == 1
    for header in sources.kernels_folder().glob("*.cuh"):
        assert text.count(f'#line 1 "{header.name}"') <= 1


def test_headers_come_once_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text("#pragma once\nint a;\n")
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint b;\n')
    file = tmp_path / "k.cu"
    file.write_text('#include "b.cuh"\n#include "a.cuh"\n#include <stdint.h>\nint k;\n')
    assert sources.flatten(file).splitlines() == [
        '#line 1 "k.cu"',
        '#line 1 "b.cuh"',
        "",
        '#line 1 "a.cuh"',
        "",
        "int a;",
        '#line 3 "b.cuh"',
        "int b;",
        '#line 2 "k.cu"',
        '#line 3 "k.cu"',
        "#include <stdint.h>",
        "int k;",
    ]


def test_kernels_in_comments_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "k.cu"
    file.write_text(
        "// HBX_KERNEL no(int x) {}\n/*\nHBX_KERNEL neither(int x) {}\n*/\nHBX_KERNEL one(int x) {}\n"
        "HBX_KERNEL __launch_bounds__(256, 4)\ntwo(int x) {}\n"
    )
    assert sources.kernels_in(file) == ["one", "two"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "k.cu"
    file.write_text('#include "nowhere.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"k\.cu includes nowhere\.cuh"):
        sources.flatten(file)
    with pytest.raises(FileNotFoundError, match=r"none\.cu"):
        sources.source("none.cu")


def test_an_installation_without_kernels_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "hbx_gpu")
    with pytest.raises(FileNotFoundError, match="CUDA kernels are missing"):
        sources.kernels_folder()
    inside = tmp_path / "hbx_gpu" / "kernels"
    inside.mkdir(parents=True)
    (inside / "hbx.cuh").write_text("")
    assert sources.kernels_folder() == inside
