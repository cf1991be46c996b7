"""Values of an archive in another dtype."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.header import read_header
from hbx_gpu.scdl._format.values import DATA_DTYPES, Tolerance
from hbx_gpu.scdl._writing.cast import cast_archive
from tests import npz
from tests.scdl.files import content, leftovers, make


@pytest.mark.parametrize("to", DATA_DTYPES)
@pytest.mark.parametrize("source", ["float32", "uint16"])
def test_cast_changes_the_values_dtype_and_nothing_else(tmp_path: Path, source: str, to: str) -> None:
    path = make(tmp_path, "one", dtype=source, near=True)
    before = content(path)
    (path / "mine.txt").write_text("kept")
    cast_archive(path, to)
    after = content(path)
    assert after.pop("dtypes") == [to, *before.pop("dtypes")[1:]]
    assert after == before
    assert read_header(path / "header.sch").dtype("DATA") == to
    assert (path / "data.npy").stat().st_size == open_archive(path).nnz * np.dtype(to).itemsize
    assert (path / "mine.txt").exists()
    assert not leftovers(tmp_path)


def test_auto_takes_the_smallest(tmp_path: Path) -> None:
    path = make(tmp_path, "one", dtype="float64")
    cast_archive(open_archive(path), "auto")
    assert open_archive(path).data.dtype == np.uint8


def test_loss_raises_and_leaves_the_archive(tmp_path: Path) -> None:
    path = make(tmp_path, "one")
    values = np.fromfile(path / "data.npy", "f4")
    values[1] = 1.5
    values.tofile(path / "data.npy")
    before = content(path)
    with pytest.raises(InvalidDataError, match=r"1\.5 as uint8 is 1"):
        cast_archive(path, "uint8")
    assert content(path) == before
    with pytest.warns(UserWarning, match="not close"):
        cast_archive(path, "uint8", tolerance=Tolerance(allow_loss=True))
    assert open_archive(path).data[1] == 1
    for name in ("int8", None, "f4"):
        with pytest.raises(ValueError, match="Invalid data_dtype"):
            cast_archive(path, name)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stale_header_is_mended(shared: Path, tmp_path: Path) -> None:
    real = shared / "fixtures" / "scdl" / "stale_cast"
    shutil.copytree(real / "archive", tmp_path / "a")
    cast_archive(tmp_path / "a", "float32")
    expected = npz.load(real / "expected.npz")["values"]
    assert read_header(tmp_path / "a" / "header.sch").dtype("DATA") == "float32"
    assert open_archive(tmp_path / "a").data.tolist() == expected.astype("f4").tolist()
