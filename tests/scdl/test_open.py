"""Archives as others left them: the right values, or an error that says what disagrees."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl._format.archive import Archive, IncompleteArchiveError, open_archive
from hbx_gpu.scdl._format.header import Header
from tests.scdl.conftest import Case, Handmade
from tests.scdl.files import SOUND


def quiet(path: Path, **options: Any) -> Archive:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return open_archive(path, **options)


def test_no_real_archive_is_left_out(scdl_cases: dict[str, Case]) -> None:
    refused = {name for name, case in scdl_cases.items() if case.info["must_raise"]}
    assert set(scdl_cases) - refused == set(SOUND)


@pytest.mark.parametrize("name", SOUND)
def test_real_archive(scdl_cases: dict[str, Case], name: str) -> None:
    case = scdl_cases[name]
    archive = quiet(case.archive)
    for array, key in ((archive.indptr, "row_ptr"), (archive.indices, "col_idx"), (archive.data, "values")):
        np.testing.assert_array_equal(array, case.expected[key], key)
        assert not array.flags.writeable
    assert archive.data.dtype == case.info["values_dtype"]
    assert (archive.n_rows, archive.nnz) == (case.info["n_rows"], case.info["nnz"])
    assert archive.bounds.tolist() == case.expected["block_row_bounds"].tolist()
    if name == "raw_default":
        assert (archive.n_vars, archive.max_width) == ([50], 70)
    else:
        assert archive.n_vars == case.info["n_vars_per_block"]
    assert [Path(str(x)).name for x in archive.var.labels] == [
        Path(x).name for x in case.info["labels_per_var_block"]
    ]
    archive.check_pointers()


@pytest.mark.parametrize("name", ["interrupted_convert", "interrupted_concat"])
def test_unfinished_real_archive_is_refused(scdl_cases: dict[str, Case], name: str) -> None:
    with pytest.raises(
        CorruptDataError, match=r"metadata\.json does not exist|row_ptr\.npy\.tmp .* good copy"
    ):
        quiet(scdl_cases[name].archive)


def test_an_interrupted_concat_opens_after_what_the_error_says(
    scdl_cases: dict[str, Case], tmp_path: Path
) -> None:
    case = scdl_cases["interrupted_concat"]
    path = tmp_path / "archive"
    shutil.copytree(case.archive, path)
    for folder in (path, *path.iterdir()):
        folder.chmod(0o755)
    (path / "row_ptr.npy.tmp").rename(path / "row_ptr.npy")
    archive = quiet(path)
    np.testing.assert_array_equal(archive.indptr, case.expected["row_ptr"])
    np.testing.assert_array_equal(archive.data, case.expected["values"])


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(p.relative_to(path)): (
            p.stat().st_mtime_ns,
            p.stat().st_mode,
            p.read_bytes() if p.is_file() else b"",
        )
        for p in (path, *path.rglob("*"))
    }


def test_opening_changes_nothing(handmade: Handmade) -> None:
    path = handmade.write()
    (path / "version.json").unlink()
    for p in (*path.rglob("*"), path):
        p.chmod(0o555 if p.is_dir() else 0o444)
    before = tree(path)
    archive = open_archive(path)
    assert archive.obs is not None
    archive.obs.lookup(0)
    archive.var.lookup(0)
    archive.gather(np.arange(40))
    assert tree(path) == before
    path.chmod(0o755)


class TestDtypeOfValues:
    """The header says one thing, the file another."""

    CASES = (
        ("f4", "f8", lambda v: v.astype("f8")),
        ("f4", "u4", lambda v: v.astype("u4")),
        ("f4", "u8", lambda v: v.astype("u8")),
        ("f4", "u1", lambda v: v.astype("u1")),
        ("f4", "u2", lambda v: v.astype("u2")),
        ("u4", "f4", lambda v: v),
        ("u8", "f8", lambda v: v.astype("f8")),
        ("u2", "f4", lambda v: v),
        ("u1", "u4", lambda v: v.astype("u4")),
        ("u1", "f8", lambda v: v.astype("f8")),
        ("u4", "u1", lambda v: v.astype("u1")),
        ("f8", "f4", lambda v: np.log1p(v)),
        ("f4", "f8", lambda v: np.log1p(v).astype("f8")),
        ("f2", "f4", lambda v: np.log1p(v).astype("f2").astype("f4")),
        ("f2", "u2", lambda v: v.astype("u2")),
    )

    @pytest.mark.parametrize(("stated", "true", "values"), CASES)
    def test_told_by_size_or_values(
        self, handmade: Handmade, stated: str, true: str, values: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        handmade.data = values(handmade.data)
        assert handmade.data.dtype == true
        handmade.stated = {"DATA": stated}
        with pytest.warns(UserWarning, match=f"header says {np.dtype(stated)}.*{np.dtype(true)}"):
            archive = open_archive(handmade.write())
        np.testing.assert_array_equal(archive.data, handmade.data, strict=True)

    @pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "f2", "f4", "f8"])
    @pytest.mark.parametrize("values", ["counts", "logs", "large"])
    def test_sound_archives_are_believed(self, handmade: Handmade, dtype: str, values: str) -> None:
        rng = np.random.default_rng(5)
        n = len(handmade.data)
        made = {"counts": handmade.data, "logs": np.log1p(handmade.data), "large": rng.integers(1, 60_000, n)}
        handmade.data = made[values].astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(open_archive(handmade.write()).data, handmade.data, strict=True)

    @pytest.mark.parametrize(("stated", "true"), [("f4", "f2"), ("u1", "f2"), ("f4", "u2")])
    def test_two_bytes_cannot_always_be_told(self, handmade: Handmade, stated: str, true: str) -> None:
        rng = np.random.default_rng(5)
        handmade.data = rng.integers(1, 60_000, len(handmade.data)).astype(true)
        handmade.stated = {"DATA": stated}
        path = handmade.write()
        with pytest.raises(CorruptDataError, match="data_dtype='uint16' or 'float16'"):
            quiet(path)
        archive = quiet(path, data_dtype=np.dtype(true).name)
        np.testing.assert_array_equal(archive.data, handmade.data, strict=True)
        again = pickle.loads(pickle.dumps(archive))
        np.testing.assert_array_equal(again.data, handmade.data, strict=True)

    @pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4", "f8"])
    @pytest.mark.parametrize("values", ["counts", "logs"])
    @pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 2, 4, "less", "more"])
    def test_cut_and_doubled_files_are_no_casts(
        self, handmade: Handmade, dtype: str, values: str, part: float | str
    ) -> None:
        made = np.log1p(handmade.data) if values == "logs" else handmade.data
        whole = np.maximum(made, 1).astype(dtype) if dtype[0] == "u" else made.astype(dtype)
        handmade.data = whole
        path = handmade.write()
        raw = whole.tobytes()
        if isinstance(part, str):
            raw = raw[:-1] if part == "less" else raw + b"\0"
        else:
            raw = (raw * 4)[: int(len(raw) * part)]
        (path / "data.npy").write_bytes(raw)
        with pytest.raises(CorruptDataError, match=r"data\.npy"):
            quiet(path)

    def test_bits_of_many_nans_are_integers(self, handmade: Handmade) -> None:
        handmade.data = np.arange(31_500, 31_500 + 4 * len(handmade.data), 4).astype("u2")
        handmade.stated = {"DATA": "f2"}
        archive = quiet(handmade.write())
        np.testing.assert_array_equal(archive.data, handmade.data, strict=True)

    def test_small_fractions_in_float16_stay(self, handmade: Handmade) -> None:
        rng = np.random.default_rng(0)
        handmade.data = (rng.integers(1, 9, len(handmade.data)) / 50_000).astype("f2")
        assert (handmade.data < 6.1e-5).mean() > 0.3
        archive = open_archive(handmade.write())
        np.testing.assert_array_equal(archive.data, handmade.data, strict=True)

    def test_a_dtype_that_cannot_be_is_not_forced(self, handmade: Handmade) -> None:
        path = handmade.write()
        with pytest.raises(ValueError, match="uint32 was asked for, but its bits are those of float32"):
            quiet(path, data_dtype="uint32")
        with pytest.raises(CorruptDataError, match="data_dtype asked for, float64"):
            quiet(path, data_dtype="float64")
        handmade.data = handmade.data.astype("u4")
        handmade.path = path.with_name("other")
        with pytest.raises(ValueError, match="float32 was asked for, but its bits are those of integers"):
            quiet(handmade.write(), data_dtype="float32")

    def test_the_sample_of_a_long_array_covers_its_end(self, handmade: Handmade) -> None:
        n = (1 << 20) + 12345
        handmade.data = np.ones(n, "f4")
        handmade.data[-1] = np.nan
        handmade.indptr, handmade.indices = np.linspace(0, n, 41).astype("i8"), np.zeros(n, "i8")
        handmade.dtypes["ROWPTR"] = "u4"
        handmade.stated = {"DATA": "u4"}
        archive = quiet(handmade.write())
        # Not all of them are whole numbers: the header stays.
        assert archive.data.dtype == np.uint32


class TestOldReleases:
    @pytest.mark.parametrize("header", [True, False])
    @pytest.mark.parametrize("low", [1, -5])
    def test_int64(self, handmade: Handmade, header: bool, low: int) -> None:
        handmade.data = np.random.default_rng(0).integers(low, 50, len(handmade.data))
        handmade.header, handmade.stated = header, {"DATA": "u8"}
        self.old(handmade)
        archive = quiet(handmade.write())
        np.testing.assert_array_equal(archive.data, handmade.data, strict=True)
        assert archive.obs is None

    def test_int32(self, handmade: Handmade) -> None:
        handmade.data = np.random.default_rng(0).integers(-5, 50, len(handmade.data)).astype("i4")
        handmade.header = False
        self.old(handmade)
        np.testing.assert_array_equal(quiet(handmade.write()).data, handmade.data, strict=True)

    @pytest.mark.parametrize("file", ["col_ptr.npy", "row_ptr.npy"])
    def test_halves_of_wide_columns_are_no_columns(self, handmade: Handmade, file: str) -> None:
        handmade.header = False
        self.old(handmade)
        path = handmade.write()
        raw = (path / file).read_bytes()
        (path / file).write_bytes(raw[: len(raw) // 2])
        with pytest.raises(CorruptDataError, match=file):
            quiet(path)

    @staticmethod
    def old(handmade: Handmade) -> None:
        handmade.dtypes = {"ROWPTR": "u8", "COLPTR": "u4"}
        handmade.var_folder, handmade.version, handmade.obs_rows = "features", "0.0.7", None


class TestWidths:
    def test_wider_than_the_header_says(self, handmade: Handmade) -> None:
        handmade.stated = {"ROWPTR": "u1", "COLPTR": "u1"}
        handmade.dtypes["COLPTR"] = "u2"
        with pytest.warns(UserWarning, match="they are uint16|columns are uint16") as said:
            archive = open_archive(handmade.write())
        assert len(said) == 2
        np.testing.assert_array_equal(archive.indptr, handmade.indptr)
        np.testing.assert_array_equal(archive.indices, handmade.indices)

    @pytest.mark.parametrize("header", [True, False])
    @pytest.mark.parametrize("file", ["col_ptr.npy", "row_ptr.npy"])
    @pytest.mark.parametrize("part", [0.5, 0.6, 2])
    def test_cut_and_doubled(self, handmade: Handmade, file: str, part: float, header: bool) -> None:
        handmade.header = header
        handmade.n_vars = 60
        handmade.dtypes["COLPTR"] = "u1" if part == 2 else "u2"
        path = handmade.write()
        raw = (path / file).read_bytes()
        (path / file).write_bytes((raw * 2)[: int(len(raw) * part)])
        with pytest.raises(CorruptDataError, match=file):
            quiet(path)

    def test_columns_are_never_narrowed(self, tmp_path: Path) -> None:
        # So few genes that halves of wider columns would do.
        made = Handmade(tmp_path / "archive", n_vars=60)
        made.n_vars, made.dtypes["COLPTR"] = 6, "u2"
        made.indices %= 6
        path = made.write()
        raw = (path / "col_ptr.npy").read_bytes()
        (path / "col_ptr.npy").write_bytes(raw[: len(raw) // 2])
        with pytest.raises(CorruptDataError, match=r"col_ptr\.npy: expected 369 columns"):
            quiet(path)

    @pytest.mark.parametrize("file", ["data.npy", "col_ptr.npy", "row_ptr.npy"])
    def test_a_copy_left_beside_is_no_archive_to_trust(self, handmade: Handmade, file: str) -> None:
        path = handmade.write()
        shutil.copy(path / file, path / f"{file}.tmp")
        with pytest.raises(CorruptDataError, match=f"{file}.tmp .* is the good copy of {file}"):
            quiet(path)

    @pytest.mark.parametrize("file", ["col_ptr.npy", "data.npy"])
    def test_pairs_of_narrow_elements_are_no_wide_ones(self, handmade: Handmade, file: str) -> None:
        """An interrupted concatenation, without header: the file is as long as its default dtype says."""
        handmade.header = False
        handmade.dtypes["COLPTR"] = "u2"
        handmade.data = handmade.data.astype("u2")
        path = handmade.write()
        (path / file).write_bytes((path / file).read_bytes() * 2)
        with pytest.raises(CorruptDataError, match=rf"{file}.*unlikely to be"):
            quiet(path, **({"data_dtype": "uint16"} if file == "col_ptr.npy" else {}))

    def test_no_header(self, handmade: Handmade) -> None:
        handmade.header = False
        with pytest.warns(UserWarning, match="SCDL header missing"):
            archive = open_archive(handmade.write())
        np.testing.assert_array_equal(archive.indices, handmade.indices)
        np.testing.assert_array_equal(archive.data, handmade.data)

    def test_a_bad_header_is_as_none(self, handmade: Handmade) -> None:
        path = handmade.write()
        (path / "header.sch").write_bytes(b"SCXX")
        with pytest.warns(UserWarning, match="Failed to load SCDL header"):
            archive = open_archive(path)
        np.testing.assert_array_equal(archive.data, handmade.data)

    def test_a_later_header_is_refused(self, handmade: Handmade) -> None:
        path = handmade.write()
        raw = (path / "header.sch").read_bytes()
        (path / "header.sch").write_bytes(raw[:4] + b"\x01" + raw[5:])
        with pytest.raises(UnsupportedError, match="schema version"):
            open_archive(path)


class TestPointers:
    def test_rows_of_index_and_pointers_differ(self, handmade: Handmade) -> None:
        handmade.indptr = np.append(handmade.indptr, handmade.indptr[-1])
        with pytest.raises(
            CorruptDataError, match=r"expected 41 row pointers \(40 rows .*found 84 bytes, .* 42 "
        ):
            quiet(handmade.write())

    def test_descending(self, handmade: Handmade) -> None:
        handmade.indptr[7] = handmade.indptr[8] + 1
        with pytest.raises(CorruptDataError, match="at row 7"):
            quiet(handmade.write())

    def test_not_from_zero(self, handmade: Handmade) -> None:
        handmade.indptr[0] = 1
        with pytest.raises(CorruptDataError, match="ascend from 0"):
            quiet(handmade.write())

    def test_descending_far_from_the_start(self, tmp_path: Path) -> None:
        n = (1 << 20) + 500
        made = Handmade(tmp_path / "archive", n_rows=30)
        made.n_rows, made.obs_rows = n, None
        made.indptr = np.zeros(n + 1, "i8")
        made.indptr[-1] = 1
        made.indptr[n - 100] = 1
        made.indices, made.data = made.indices[:1], made.data[:1]
        archive = quiet(made.write())
        assert archive.segment(5) == (0, 0)
        for read in (
            lambda: archive.segment(n - 3),
            lambda: archive.gather(np.array([3, n - 3])),
            archive.check_pointers,
        ):
            with pytest.raises(CorruptDataError, match=f"at row {n - 100}"):
                read()


class TestMissing:
    @pytest.mark.parametrize("file", ["metadata.json", "data.npy", "row_ptr.npy", "col_ptr.npy"])
    def test_file(self, handmade: Handmade, file: str) -> None:
        path = handmade.write()
        (path / file).unlink()
        with pytest.raises(FileNotFoundError, match=file) as caught:
            open_archive(path)
        assert isinstance(caught.value, IncompleteArchiveError)

    @pytest.mark.parametrize("file", ["cumulative_sum_index.npy", "dataframe_0.parquet"])
    @pytest.mark.parametrize("index", ["var_features", "obs_features"])
    def test_file_of_an_index(self, handmade: Handmade, index: str, file: str) -> None:
        path = handmade.write()
        (path / index / file).unlink()
        with pytest.raises(CorruptDataError, match=file):
            open_archive(path)

    @pytest.mark.parametrize("file", ["labels.npy", "version.npy"])
    def test_nothing_that_is_needed(self, handmade: Handmade, file: str) -> None:
        path = handmade.write()
        (path / "var_features" / file).unlink()
        assert open_archive(path).n_rows == 40

    def test_genes(self, handmade: Handmade) -> None:
        path = handmade.write()
        shutil.rmtree(path / "var_features")
        with pytest.raises(IncompleteArchiveError, match="neither var_features nor features"):
            open_archive(path)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing at"):
            open_archive(tmp_path / "none")

    @pytest.mark.parametrize("text", ["", "{", "nonsense"])
    def test_metadata_is_no_json(self, handmade: Handmade, text: str) -> None:
        path = handmade.write()
        (path / "metadata.json").write_text(text)
        with pytest.raises(CorruptDataError, match=r"metadata\.json is not JSON"):
            open_archive(path)

    def test_cells_of_another_number_of_rows(self, handmade: Handmade) -> None:
        handmade.obs_rows = 39
        with pytest.warns(UserWarning, match="cell columns of 39 rows, but the archive has 40"):
            archive = open_archive(handmade.write())
        np.testing.assert_array_equal(archive.data, handmade.data)
        with pytest.raises(CorruptDataError, match="39 rows"):
            _ = archive.obs

    def test_stray_parquet_files_are_no_blocks(self, handmade: Handmade) -> None:
        path = handmade.write()
        for index in ("var_features", "obs_features"):
            (path / index / "below").mkdir()
            for name in ("dataframe_1.parquet", "aaa.parquet", "below/dataframe_0.parquet"):
                shutil.copy(path / index / "dataframe_0.parquet", path / index / name)
        assert open_archive(path).n_vars == [60]


class TestEmpty:
    @pytest.mark.parametrize("padding", [0, 1, 4])
    def test_no_values(self, handmade: Handmade, padding: int) -> None:
        handmade.indptr = np.zeros(41, "i8")
        handmade.indices, handmade.data = handmade.indices[:0], handmade.data[:0]
        path = handmade.write()
        for file in ("data.npy", "col_ptr.npy"):
            (path / file).write_bytes(b"\0" * padding)
        archive = open_archive(path)
        assert (archive.n_rows, archive.nnz, len(archive.data)) == (40, 0, 0)
        assert [len(part) for part in archive.gather(np.array([0, 39]))] == [0, 0, 3]

    def test_values_that_no_pointer_names(self, handmade: Handmade) -> None:
        handmade.indptr = np.zeros(41, "i8")
        with pytest.raises(CorruptDataError, match="expected no values"):
            quiet(handmade.write())


def hostile(folder: Path, marker: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    np.save(folder / "labels.npy", np.array([Trap()], object), allow_pickle=True)


def test_labels_call_nothing(handmade: Handmade, tmp_path: Path, scdl_cases: dict[str, Case]) -> None:
    path = handmade.write()
    hostile(path / "var_features", tmp_path / "ran")
    hostile(path / "obs_features", tmp_path / "ran")
    archive = open_archive(path)
    assert archive.var.labels == [None]
    assert not (tmp_path / "ran").exists()
    # Those of real archives are read nevertheless.
    assert open_archive(scdl_cases["ragged_two"].archive).var.labels == ["h5ad/part0.h5ad", "h5ad/part1.h5ad"]


def _doubled(n: int) -> bytes:
    """A path joined to itself n times: 64 characters, then 128, 256, ..."""
    raw = b"\x80\x04\x8c\x07pathlib\x8c\x0dPurePosixPath\x93\x94\x8c\x40" + b"a" * 64 + b"\x85R\x94"
    for k in range(1, n + 1):
        raw += b"h\x00h%ch%c\x86R\x94" % (k, k)
    return raw + b"."


@pytest.mark.parametrize(
    "raw",
    [
        _doubled(30),
        b"\x80\x04Nr" + (2**31 - 1).to_bytes(4, "little") + b".",  # a memo of 2**31 entries
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",  # a text of a terabyte
        b"cposix\nsystem\n(S'true'\ntR.",
    ],
    ids=["doubled path", "memo", "bytearray", "text", "call"],
)
def test_labels_take_no_more_memory_than_their_file(handmade: Handmade, raw: bytes) -> None:
    path = handmade.write()
    with (path / "var_features" / "labels.npy").open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(raw)
    tracemalloc.start()
    assert open_archive(path).var.labels == [None]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_labels_of_a_shape_that_the_file_does_not_have(handmade: Handmade) -> None:
    path = handmade.write()
    with (path / "var_features" / "labels.npy").open("wb") as file:
        header = {"descr": "<U64", "fortran_order": False, "shape": (10**8,)}
        np.lib.format.write_array_header_1_0(file, header)
    assert open_archive(path).var.labels == [None]


def test_labels(handmade: Handmade) -> None:
    path = handmade.write()
    file = path / "var_features" / "labels.npy"
    for stored, expected in (
        (np.array([Path("/data/a.h5ad")], object), "/data/a.h5ad"),
        (np.array([None], object), None),
        (np.array(["plain"], object), "plain"),
        (np.array(["plain"]), "plain"),
        (np.array([3], object), None),
        (np.array([["a", "b"]]), None),
    ):
        np.save(file, stored, allow_pickle=True)
        assert open_archive(path).var.labels == [expected]
    (path / "var_features" / "labels.json").write_text(json.dumps([None]))
    assert open_archive(path).var.labels == [None]


@pytest.mark.parametrize("protocol", range(3, 6))
def test_labels_of_every_pickle_protocol(handmade: Handmade, protocol: int) -> None:
    path = handmade.write()
    labels = np.array([Path("/data/x y.h5ad")], object)
    with (path / "var_features" / "labels.npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(labels))
        out.write(pickle.dumps(labels, protocol=protocol))
    assert open_archive(path).var.labels == ["/data/x y.h5ad"]


def test_pickled_archives_are_small(handmade: Handmade) -> None:
    archive = open_archive(handmade.write())
    raw = pickle.dumps(archive)
    assert len(raw) < 500
    np.testing.assert_array_equal(pickle.loads(raw).data, archive.data)


def test_files_of_an_index_that_are_damaged(handmade: Handmade) -> None:
    """Headers of .npy files are parsed as Python, and fail in many ways."""
    path = handmade.write()
    folder = path / "var_features"
    for name in ("labels.npy", "cumulative_sum_index.npy"):
        whole = (folder / name).read_bytes()
        for at in range(len(whole) - 8):
            for raw in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x24]) + whole[at + 1 :]):
                (folder / name).write_bytes(raw)
                if name == "labels.npy":
                    assert open_archive(path).n_rows == 40
                    continue
                with contextlib.suppress(CorruptDataError):
                    assert open_archive(path).bounds.tolist() == [0, 40]
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("n", [10**6, 2 * 10**8])
def test_opening_costs_the_same_whatever_the_size(handmade: Handmade, n: int) -> None:
    """Files with holes: as many rows as asked for, of which the last one has all values."""
    nnz = len(handmade.data)
    path = handmade.write()
    np.save(path / "var_features" / "cumulative_sum_index.npy", np.array([-1, n]))
    shutil.rmtree(path / "obs_features")
    with open(path / "row_ptr.npy", "wb") as file:
        file.seek(8 * n)
        file.write(np.uint64(nnz).tobytes())
    tracemalloc.start()
    clock = time.perf_counter()
    archive = quiet(path)
    row = archive.row(n - 1)
    assert time.perf_counter() - clock < 2
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert (archive.n_rows, archive.nnz) == (n, nnz)
    np.testing.assert_array_equal(row[0], handmade.data)


def test_columns_beyond_the_genes(handmade: Handmade) -> None:
    handmade.n_vars = 50
    archive = open_archive(handmade.write())
    assert (archive.n_vars, archive.width(0)) == ([50], int(handmade.indices.max()) + 1)


def test_the_header_of_handmade_archives_is_sound(handmade: Handmade) -> None:
    archive = open_archive(handmade.write())
    assert isinstance(archive.header, Header)
    assert archive.header.feature_index("obs_features") is not None
