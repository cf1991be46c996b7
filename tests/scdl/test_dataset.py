"""The read API of SCDL on real archives, and what is better than there."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import scdl
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl import Mode, SingleCellMemMapDataset
from hbx_gpu.scdl._api import collate
from hbx_gpu.scdl._format import archive as archive_module
from tests.scdl.conftest import Case, Handmade
from tests.scdl.files import SOUND, content, leftovers

torch = pytest.importorskip("torch")

SIGNATURE = {
    "data_path": inspect.Parameter.empty, "h5ad_path": None, "num_elements": None, "num_rows": None,
    "mode": "r+", "paginated_load_cutoff": 10_000, "load_block_row_size": 1_000_000,
    "var_feature_index_name": "var_feature_id",
    "obs_feature_index_name": "obs_feature_id", "load_neighbors": False, "neighbor_key": "next_cell_ids",
    "neighbor_sampling_strategy": "random", "fallback_to_identity": True, "data_dtype": None,
    "data_dtype_tolerance": 1e-08, "use_X_not_raw": False,
}  # fmt: skip


def opened(case: Case | Path, **options: Any) -> SingleCellMemMapDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SingleCellMemMapDataset(case.archive if isinstance(case, Case) else case, **options)


def test_signature() -> None:
    parameters = inspect.signature(SingleCellMemMapDataset).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == SIGNATURE
    assert list(positional) == list(SIGNATURE)


def test_public_names_exist_and_cost_nothing() -> None:
    for name in scdl.__all__:
        assert getattr(scdl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = scdl.nonsense  # type: ignore[attr-defined]
    check = (
        "import sys, hbx_gpu.scdl; sys.exit(any(m in sys.modules for m in ('torch', 'pyarrow', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", SOUND)
def test_rows(scdl_cases: dict[str, Case], name: str) -> None:
    case = scdl_cases[name]
    dataset, expected = opened(case), case.expected
    n, bounds = case.info["n_rows"], expected["block_row_bounds"]
    assert len(dataset) == dataset.number_of_rows() == n
    item_dtype = np.promote_types(expected["values"].dtype, dataset.col_index.dtype)
    batch = dataset.__getitems__(range(n)) if len(bounds) == 2 else [dataset[i] for i in range(n)]
    for row in range(n):
        start, stop = (int(e) for e in expected["row_ptr"][row : row + 2])
        (values, columns), var, obs = dataset.get_row(row)
        np.testing.assert_array_equal(values, expected["values"][start:stop], strict=True)
        np.testing.assert_array_equal(columns, expected["col_idx"][start:stop])
        assert (var, obs) == (None, None)
        block = int(np.searchsorted(bounds, row, side="right")) - 1
        dense = expected[f"dense_{block}"][row - bounds[block]]
        padded = dataset.get_row_padded(row)[0]
        np.testing.assert_array_equal(padded, dense, strict=True)
        for column in (*columns[:3].tolist(), int(np.argmin(dense))):
            assert dataset.get_row_column(row, column) == dense[column]
        for item in (dataset[row], dataset[np.int64(row - n)], batch[row]):
            assert item.numpy().dtype == item_dtype
            np.testing.assert_array_equal(item.numpy()[0], values)
            np.testing.assert_array_equal(item.numpy()[1], columns)


def test_counts(scdl_cases: dict[str, Case]) -> None:
    dataset = opened(scdl_cases["ragged_two"])
    assert dataset.shape() == (43, [60, 90])
    assert dataset.number_of_variables() == [60, 90]
    assert dataset.number_of_values() == 18 * 60 + 25 * 90
    assert dataset.number_nonzero_values() == 678
    assert dataset.sparsity() == pytest.approx(1 - 678 / 3330)
    assert dataset.dtypes == {
        "data.npy": "float32", "col_ptr.npy": "uint8", "row_ptr.npy": "uint16",
        "neighbor_indices.npy": "uint32", "neighbor_indptr.npy": "uint64", "neighbor_values.npy": "float32",
    }  # fmt: skip
    assert dataset.metadata["num_rows"] == 18
    assert dataset.header_path == str(dataset.data_path / "header.sch")  # type: ignore[operator]
    assert (dataset.mode, dataset.version()) == (Mode.READ_APPEND, "0.1.3")
    assert isinstance(dataset.data, np.memmap)


def test_features(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["ragged_two"]
    dataset = opened(case)
    for row in (0, 17, 18, 42, -1):
        position = row % 43
        var_block = next(b for b in case.frames("var") if b["row_start"] <= position < b["row_stop"])
        obs_block = next(b for b in case.frames("obs") if b["row_start"] <= position < b["row_stop"])
        _, var, obs = dataset.get_row(row, return_var_features=True, return_obs_features=True)
        assert var is not None
        assert obs is not None
        assert [column.tolist() for column in var] == list(var_block["columns"].values())
        wanted = [c[position - obs_block["row_start"]] for c in obs_block["columns"].values()]
        assert [None if v != v else v for v in obs] == wanted
        name = list(obs_block["columns"])[-1]
        padded = dataset.get_row_padded(row, return_obs_features=True, obs_feature_names=[name])
        assert padded[2] is not None
        assert [None if v != v else v for v in padded[2]] == wanted[-1:]
        assert dataset.get_row(row, return_var_features=True, var_feature_names=[])[1] == []
        assert dataset.get_row(row, obs_feature_names=[name])[2] is None
        with pytest.raises(ValueError, match="'nonsense'"):
            dataset.get_row(row, True, ["nonsense"])
    assert len(dataset.var_features()) == len(case.frames("var"))
    assert len(dataset.obs_features()) == len(case.frames("obs"))


def test_archives_without_cells(scdl_cases: dict[str, Case]) -> None:
    dataset = opened(scdl_cases["legacy_v012"])
    assert len(dataset.obs_features()) == 0
    with pytest.raises(IndexError, match="no features to lookup"):
        dataset.get_row(0, return_obs_features=True)


class TestIndices:
    @pytest.fixture
    def dataset(self, scdl_cases: dict[str, Case]) -> SingleCellMemMapDataset:
        return opened(scdl_cases["empty_rows"])

    @pytest.mark.parametrize("outside", [20, -21, 10**12])
    def test_outside(self, dataset: SingleCellMemMapDataset, outside: int) -> None:
        for read in (
            dataset.__getitem__,
            dataset.get_row,
            dataset.get_row_padded,
            lambda i: dataset[[0, i]],
            lambda i: dataset.get_row_column(i, 0),
        ):
            with pytest.raises(IndexError, match=f"row {outside} is out of range: the archive has 20 rows"):
                read(outside)

    def test_iteration_ends(self, dataset: SingleCellMemMapDataset) -> None:
        assert len(list(dataset)) == 20  # type: ignore[call-overload]

    def test_empty_rows(self, dataset: SingleCellMemMapDataset) -> None:
        assert dataset[0].shape == dataset[-1].shape == (2, 0)
        assert not dataset.get_row_padded(8)[0].any()
        assert [len(part) for part in dataset.get_row(8)[0]] == [0, 0]

    def test_many(self, dataset: SingleCellMemMapDataset) -> None:
        for index in (
            slice(3, 9),
            slice(None, None, -3),
            [5, 5, -1],
            np.array([4, 2]),
            range(3),
            slice(5, 5),
        ):
            numbers = list(range(20))[index] if isinstance(index, slice) else list(index)
            rows = dataset[index]
            assert len(rows) == len(numbers)
            for row, number in zip(rows, numbers, strict=True):
                assert torch.equal(row, dataset[int(number)])

    @pytest.mark.parametrize("wrong", ["a", 1.5, None, ["a"]])
    def test_no_index(self, dataset: SingleCellMemMapDataset, wrong: Any) -> None:
        with pytest.raises(TypeError):
            dataset[wrong]

    def test_elements(self, dataset: SingleCellMemMapDataset) -> None:
        assert dataset.get_row_column(0, 3) == 0.0
        assert dataset.get_row_column(0, 3, impute_missing_zeros=False) is None
        assert dataset.get_row_column(1, None) is None
        (values, columns), _, _ = dataset.get_row(1)
        assert isinstance(dataset.get_row_column(1, int(columns[0])), np.float32)
        assert dataset.get_row_column(1, int(columns[0])) == values[0]


def test_rows_cannot_be_written(scdl_cases: dict[str, Case]) -> None:
    dataset = opened(scdl_cases["single_f32"])
    values = dataset.get_row(0)[0][0]
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1
    dataset[0][0, 0] = 99
    assert dataset.get_row(0)[0][0][0] != 99


class TestColumnsBeyondTheGenes:
    def test_small_archives_are_widened(self, scdl_cases: dict[str, Case]) -> None:
        dataset = opened(scdl_cases["raw_default"])
        assert dataset.number_of_variables() == [50]
        assert {len(dataset.get_row_padded(row)[0]) for row in range(16)} == {70}

    def test_large_ones_refuse_such_rows(self, handmade: Handmade, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive_module, "_MEASURED", 10)
        handmade.n_vars = 50
        dataset = SingleCellMemMapDataset(handmade.write())
        beyond = [row for row in range(40) if (dataset.get_row(row)[0][1] >= 50).any()]
        assert 0 < len(beyond) < 40
        for row in range(40):
            if row in beyond:
                with pytest.raises(UnsupportedError, match=f"row {row}: column .* but 50 genes"):
                    dataset.get_row_padded(row)
            else:
                assert len(dataset.get_row_padded(row)[0]) == 50


class TestOpening:
    def test_nothing_there(self, tmp_path: Path) -> None:
        for options in ({}, {"num_rows": 3}, {"num_rows": np.int64(3), "num_elements": np.int64(4)}):
            with pytest.raises(
                ValueError, match="path, an h5ad path, or the number of elements and rows is req"
            ):
                SingleCellMemMapDataset(tmp_path / "new", **options)
        with pytest.raises(ValueError, match="above 0"):
            SingleCellMemMapDataset(tmp_path / "new", num_rows=0, num_elements=1)
        assert not list(tmp_path.iterdir())

    def test_existing_targets(self, scdl_cases: dict[str, Case]) -> None:
        archive = scdl_cases["single_f32"].archive
        for options in ({"h5ad_path": "source.h5ad"}, {"mode": "w+"}, {"mode": Mode.CREATE_APPEND}):
            with pytest.raises(FileExistsError, match="already exists"):
                SingleCellMemMapDataset(archive, **options)

    @pytest.mark.parametrize("bad", ["int32", np.float32, "float"])
    def test_bad_dtype_comes_first(self, scdl_cases: dict[str, Case], bad: Any) -> None:
        with pytest.raises(ValueError, match="Invalid data_dtype"):
            SingleCellMemMapDataset(scdl_cases["single_f32"].archive, "source.h5ad", data_dtype=bad)

    def test_a_dtype_of_the_callers(self, scdl_cases: dict[str, Case]) -> None:
        for name, dtype in (("stale_cast", "float64"), ("stale_cast_same_width", "uint32")):
            case = scdl_cases[name]
            dataset = SingleCellMemMapDataset(case.archive, data_dtype=dtype)
            np.testing.assert_array_equal(dataset.data, case.expected["values"], strict=True)
        with pytest.raises(CorruptDataError, match="asked for, float32"):
            SingleCellMemMapDataset(scdl_cases["uint16_counts"].archive, data_dtype="float32")
        assert (
            SingleCellMemMapDataset(scdl_cases["single_f32"].archive, data_dtype="auto").data.dtype
            == np.float32
        )

    def test_load(self, scdl_cases: dict[str, Case]) -> None:
        dataset = opened(scdl_cases["single_f32"])
        dataset.load(scdl_cases["uint16_counts"].archive)
        assert (len(dataset), dataset.dtypes["data.npy"]) == (30, "uint16")

    def test_as_text_or_path(self, scdl_cases: dict[str, Case]) -> None:
        archive = scdl_cases["single_f32"].archive
        assert len(SingleCellMemMapDataset(str(archive))) == len(SingleCellMemMapDataset(Path(archive))) == 40

    def test_save(self, scdl_cases: dict[str, Case], tmp_path: Path) -> None:
        dataset = opened(scdl_cases["single_f32"])
        assert dataset.save() is True
        assert dataset.save(tmp_path / "other")
        assert dataset.data_path == scdl_cases["single_f32"].archive
        assert content(tmp_path / "other") == content(dataset.data_path)
        with pytest.raises(FileExistsError, match="already exists"):
            dataset.save(tmp_path / "other")
        assert leftovers(tmp_path) == []

    def test_room_for_rows(self, tmp_path: Path) -> None:
        created = SingleCellMemMapDataset(tmp_path / "new", num_rows=2, num_elements=10)
        assert created.save()
        for dataset in (created, SingleCellMemMapDataset(tmp_path / "new")):
            assert dataset.shape() == (0, [0])
            assert (dataset.number_of_values(), dataset.sparsity(), len(dataset.data)) == (0, 0.0, 10)
            assert dataset[1].shape == (2, 0)
            assert dataset.dtypes["row_ptr.npy"] == "uint64"

    def test_room_can_be_filled(self, tmp_path: Path) -> None:
        created = SingleCellMemMapDataset(tmp_path / "new", num_rows=2, num_elements=3)
        created.row_index[:], created.col_index[:], created.data[:] = [0, 2, 3], [4, 1, 0], [5, 6, 7]
        assert created.save()
        reopened = SingleCellMemMapDataset(tmp_path / "new")
        assert reopened[0].tolist() == [[5, 6], [4, 1]]
        assert reopened[-1].tolist() == [[7], [0]]
        with pytest.raises(ValueError, match="read-only"):
            reopened.data[0] = 1


def test_workers_get_a_path(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["neighbors"]
    dataset = opened(case, load_neighbors=True)
    raw = pickle.dumps(dataset)
    assert len(raw) < 2000
    again = pickle.loads(raw)
    np.testing.assert_array_equal(again.data, case.expected["values"])
    assert again.get_neighbor_stats() == dataset.get_neighbor_stats()
    assert isinstance(again.data, np.memmap)


def test_opening_reads_no_rows(handmade: Handmade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell columns, gene columns and rows stay on disk until they are asked for."""
    path = handmade.write()
    from hbx_gpu.scdl._format import frames

    def refuse(*_: Any) -> None:
        raise AssertionError("a table was read")

    monkeypatch.setattr(frames.StoredFrame, "_open", refuse)
    dataset = SingleCellMemMapDataset(path)
    dataset.get_row(3)
    with pytest.raises(AssertionError, match="a table"):
        dataset.get_row(3, return_obs_features=True)


def test_batches_know_their_width(scdl_cases: dict[str, Case]) -> None:
    rows = opened(scdl_cases["single_f32"])[[1, 2]]
    assert isinstance(rows, collate.Rows)
    assert rows.n_features == 120
