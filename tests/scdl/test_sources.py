"""Archives as Sources: every real archive through a dataset, one gene axis for many, obs, pickles."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hbx_gpu._engine.host.dense import densify
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import CorruptDataError, InvalidDataError, UnknownNameError
from hbx_gpu.scdl import SingleCellCollection, open_archive
from hbx_gpu.scdl._sources.axis import gene_axis
from hbx_gpu.scdl._sources.cells import encode, groups_of, obs_names_of, to_cell_dataset
from hbx_gpu.scdl._writing.convert import convert_h5ad
from tests.scdl import files
from tests.scdl.conftest import Case, Handmade
from tests.scdl.files import block, dense_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_every_archive_gives_its_matrix(scdl_cases: dict[str, Case]) -> None:
    for name, case in scdl_cases.items():
        if case.info["must_raise"]:
            with pytest.raises(CorruptDataError):
                to_cell_dataset(case.archive)
            continue
        for reader in ("mmap", "preadv"):
            dataset = to_cell_dataset(case.archive, reader=reader)
            batch = dataset[:]
            assert batch.values.dtype == case.expected["values"].dtype, name
            # Stored order, repeats and explicit zeros included.
            assert np.array_equal(batch.values, case.expected["values"]), name
            assert np.array_equal(batch.offsets, case.expected["row_ptr"]), name
            truth = dense_of(case, dataset)
            assert np.array_equal(densify(batch, dtype="float64"), truth), name
            rows = np.random.default_rng(0).integers(-len(dataset), len(dataset), 50)
            assert np.array_equal(densify(dataset[rows], dtype="float64"), truth[rows]), name


def test_unsorted_and_repeated_columns_stay_as_stored(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["unsorted_columns"]
    batch = to_cell_dataset(case.archive)[:]
    assert np.array_equal(batch.indices, case.expected["col_idx"])
    assert (np.diff(case.expected["col_idx"][: case.expected["row_ptr"][1]]) <= 0).any()


def test_ragged_blocks_share_genes_by_id(scdl_cases: dict[str, Case]) -> None:
    dataset = to_cell_dataset(scdl_cases["ragged_two"].archive)
    assert dataset.n_groups == 2
    assert dataset.n_features == 120  # 60 and 90 genes, 30 of them the same
    assert len(set(dataset.feature_uids)) == 120
    assert dataset.groups_np.tolist() == [0] * 18 + [1] * 25
    first, second = (source.remap for source in dataset.sources)
    assert first.tolist() == list(range(60))
    assert len(set(first) & set(second)) == 30
    # The same genes twice, apart: one remap object.
    merged = to_cell_dataset(scdl_cases["merge_blocks"].archive)
    assert merged.n_features == 46
    assert merged.sources[0].remap is merged.sources[2].remap
    assert len(to_cell_dataset(scdl_cases["ragged_ten"].archive).feature_uids) == 125


def test_raw_beside_the_genes_of_x_is_numbered(scdl_cases: dict[str, Case]) -> None:
    dataset = to_cell_dataset(scdl_cases["raw_default"].archive)
    assert dataset.feature_uids.tolist() == [str(i) for i in range(70)]
    with pytest.raises(InvalidDataError, match="70 columns, but 50 genes are recorded"):
        to_cell_dataset([scdl_cases["raw_default"].archive] * 2)
    # Told to, blocks of different genes are numbered too: every row keeps the columns it has.
    paths = [scdl_cases[name].archive for name in ("raw_default", "single_f32")]
    joined = to_cell_dataset(paths, feature_id="position")
    assert joined.n_features == 120
    dense = densify(joined[:], dtype="float32")
    for case, rows in ((scdl_cases["raw_default"], slice(0, 16)), (scdl_cases["single_f32"], slice(16, 56))):
        expected = case.expected["dense"]
        np.testing.assert_array_equal(dense[rows, : expected.shape[1]], expected)
        assert not dense[rows, expected.shape[1] :].any()


def test_several_archives_are_one_dataset(scdl_cases: dict[str, Case]) -> None:
    cases = [scdl_cases[name] for name in ("uint16_counts", "ragged_two", "all_dtypes_uint8")]
    dataset = to_cell_dataset([case.archive for case in cases])
    assert dataset.dtype == np.float32
    assert dataset.n_groups == 4
    assert len(dataset) == 30 + 43 + 10
    whole = densify(dataset[:], dtype="float64")
    begin = 0
    for case in cases:
        alone = to_cell_dataset(case.archive)
        place = {uid: i for i, uid in enumerate(dataset.feature_uids)}
        columns = [place[uid] for uid in alone.feature_uids]
        part = whole[begin : begin + len(alone)]
        assert np.array_equal(part[:, columns], densify(alone[:], dtype="float64"))
        begin += len(alone)
    assert groups_of([open_archive(case.archive) for case in cases]).tolist() == dataset.groups_np.tolist()


def test_a_collection_becomes_a_dataset(tmp_path: Path) -> None:
    for name in ("b", "a"):
        convert_h5ad(
            files.h5ad(tmp_path / f"{name}.h5ad", files.counts(20, 9, seed=ord(name))), tmp_path / "c" / name
        )
    collection = SingleCellCollection.open(tmp_path / "c")
    dataset = collection.to_cell_dataset(["kind", "obs_name"])
    assert len(dataset) == 40
    assert dataset.n_features == 9
    assert dataset.feature_uids.tolist() == [f"ng{i}" for i in range(9)]
    assert collection.groups_np.tolist() == dataset.groups_np.tolist()
    # The stored order of categories.
    assert dataset.categories["kind"].tolist()[:2] == ["b", "a"]
    codes = dataset.columns["obs_name"]
    assert dataset.categories["obs_name"][codes].tolist() == [f"c{i}" for i in range(20)] * 2


def test_what_identifies_genes() -> None:
    a = block("a", 3, feature_id=["x", "y", "z"], symbol=["p", "p", "q"], length=[1, 2, 3])
    b = block("b", 2, feature_id=["z", "w"], symbol=["q", "r"], length=[5, 5])
    axis = gene_axis([a, b])
    assert (axis.column, axis.uids.tolist()) == ("feature_id", ["x", "y", "z", "w"])
    assert [remap.tolist() for remap in axis.remaps] == [[0, 1, 2], [2, 3]]
    assert gene_axis([a, b], "position").uids.tolist() == ["0", "1", "2"]
    with pytest.raises(
        InvalidDataError, match=r"a: column 'symbol' of var names 1 genes more than once.*'p'"
    ):
        gene_axis([a, b], "symbol")
    with pytest.raises(UnknownNameError, match=r"no column 'nothing'; it has \['feature_id', 'symbol'"):
        gene_axis([a, b], "nothing")
    # One block needs no ids, but has them where it can.
    assert gene_axis([block("a", 2, length=[1, 1])]).uids.tolist() == ["0", "1"]
    assert gene_axis([block("a", 2, np.array(["n", "m"], object), length=[1, 1])]).column == "names"
    twice = block("a", 3, np.array(["n", "m", "n"], object), length=[1, 1, 1])
    assert gene_axis([twice]).uids.tolist() == ["n", "m", "n"]
    with pytest.raises(InvalidDataError, match="more than once"):
        gene_axis([twice, block("b", 1, np.array(["n"], object), length=[1])], "names")
    with pytest.raises(InvalidDataError, match=r"feature_id='unique_names' to number repeated names"):
        gene_axis([twice, block("b", 1, np.array(["n"], object), length=[1])])
    unique = gene_axis([twice, block("b", 1, np.array(["m"], object), length=[1])], "unique_names")
    assert unique.uids.tolist() == ["n", "m", "n-1"]
    assert unique.remaps[1].tolist() == [1]
    with pytest.raises(InvalidDataError, match="several columns would do"):
        gene_axis([block("a", 1, one=["x"], two=["y"]), block("b", 1, one=["x"], two=["y"])])
    with pytest.raises(InvalidDataError, match="none of the columns they share"):
        gene_axis([block("a", 1, one=["x"]), block("b", 1, two=["x"])])
    with pytest.raises(InvalidDataError, match="missing values"):
        gene_axis([a, block("b", 1, feature_id=pa.array([None], pa.string()))], "feature_id")
    # Whole numbers are ids when asked for.
    assert gene_axis([block("a", 2, id=[7, 8]), block("b", 1, id=[8])], "id").remaps[1].tolist() == [1]


def test_obs_columns_of_real_archives(scdl_cases: dict[str, Case]) -> None:
    for name, case in scdl_cases.items():
        if case.info["must_raise"]:
            continue
        blocks = case.frames("obs")
        columns = list(dict.fromkeys(column for frame in blocks for column in frame["columns"]))
        assert obs_names_of([open_archive(case.archive)]) == columns, name
        dataset: Any = to_cell_dataset(case.archive, metadata_columns=columns)
        for column in columns:
            expected = np.concatenate(
                [
                    frame["columns"].get(column, [None] * (frame["row_stop"] - frame["row_start"]))
                    for frame in blocks
                ]
            ).tolist()
            found = dataset[:].metadata[column]
            if column in dataset.categories:
                vocabulary = [*dataset.categories[column], None]
                assert [vocabulary[code] for code in found] == expected, (name, column)
            else:
                assert np.array_equal(found, np.array(expected, float), equal_nan=True), (name, column)
    with pytest.raises(UnknownNameError, match=r"no obs column 'nope' .*; there are \['cell_type'"):
        to_cell_dataset(scdl_cases["single_f32"].archive, metadata_columns=["nope"])


def test_columns_as_batches_carry_them() -> None:
    numbers, no_vocabulary = encode(pa.chunked_array([pa.array([3, None], pa.int32())]))
    assert no_vocabulary is None
    assert np.array_equal(numbers, [3.0, np.nan], equal_nan=True)
    assert encode(pa.chunked_array([pa.array([3], pa.uint8())]))[0].dtype == np.uint8
    vocabulary: Any
    codes, vocabulary = encode(pa.chunked_array([pa.array([True, None, False])]))
    assert (codes.tolist(), vocabulary.tolist()) == ([1, -1, 0], [False, True])
    codes, vocabulary = encode(pa.chunked_array([["b", None], ["a", "b"]], pa.string()))
    assert (codes.tolist(), vocabulary.tolist()) == ([1, -1, 0, 1], ["a", "b"])
    parts = [
        pa.DictionaryArray.from_arrays(pa.array([1, None], pa.int8()), ["b", "a"]),
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), ["c"]),
    ]
    codes, vocabulary = encode(pa.chunked_array(parts))
    assert [None if c < 0 else vocabulary[c] for c in codes] == ["a", None, "c"]
    empty = pa.chunked_array([], pa.dictionary(pa.int8(), pa.string()))
    assert encode(empty)[0].tolist() == []


def test_damage_is_named(handmade: Handmade) -> None:
    handmade.indices[5] = 99
    handmade.dtypes["COLPTR"] = "u2"
    archive = handmade.write()
    # More columns than genes: nothing says which genes they are, so they are numbered.
    assert to_cell_dataset(archive).n_features == 100
    pointers = np.fromfile(archive / "row_ptr.npy", "u2")
    pointers[3] = pointers[4] + 1
    pointers.tofile(archive / "row_ptr.npy")
    with pytest.raises(CorruptDataError, match="row_ptr"):
        to_cell_dataset(archive)


def test_a_file_cut_short_after_opening(handmade: Handmade) -> None:
    archive = open_archive(handmade.write())
    dataset = to_cell_dataset(archive)
    with open(archive.path / "data.npy", "r+b") as file:
        file.truncate(40)
    with pytest.raises(CorruptDataError, match="cut short"):
        dataset[:]


def test_an_archive_that_is_replaced_is_noticed(handmade: Handmade, tmp_path: Path) -> None:
    dataset = to_cell_dataset(handmade.write())
    other = Handmade(tmp_path / "other", seed=1)
    other.write()
    handmade.path.rename(tmp_path / "aside")
    other.path.rename(handmade.path)
    with pytest.raises(CorruptDataError, match="replaced"):
        dataset[:]


def test_allocated_and_empty_archives(tmp_path: Path) -> None:
    from hbx_gpu.scdl._writing.writer import allocate

    allocate(tmp_path / "room", n_rows=3, n_elements=10)
    dataset = to_cell_dataset(tmp_path / "room")
    assert len(dataset) == 3
    assert dataset[:].offsets.tolist() == [0, 0, 0, 0]


def _sum_in_child(dataset: CellDataset, answer: Any) -> None:
    batch: Any = dataset[:]
    answer.put((float(batch.values.sum()), batch.metadata["cell_type"].tolist(), len(dataset.feature_uids)))


def test_spawned_processes_get_a_path(scdl_cases: dict[str, Case]) -> None:
    dataset = to_cell_dataset(scdl_cases["single_f32"].archive, metadata_columns=["cell_type"])
    assert len(pickle.dumps(dataset)) < 2000
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_sum_in_child, args=(dataset, answers))
    child.start()
    found = answers.get(timeout=120)
    child.join()
    batch: Any = dataset[:]
    assert found == (float(batch.values.sum()), batch.metadata["cell_type"].tolist(), 120)
    # Where the folder of arrays is gone, the archive is opened again, with its options.
    stored = dataset.__getstate__()
    rebuilt: Any = CellDataset.__new__(CellDataset)
    rebuilt.__setstate__({**stored, "spill": None})
    assert np.array_equal(rebuilt[:].values, batch.values)
    assert rebuilt[:].metadata["cell_type"].tolist() == batch.metadata["cell_type"].tolist()


def test_stale_dtypes_survive_the_way_to_a_worker(scdl_cases: dict[str, Case]) -> None:
    dataset = to_cell_dataset(scdl_cases["stale_cast"].archive)
    copy = dataset._recipe.rebuild()  # type: ignore[union-attr]
    assert copy.dtype == np.float64
    assert np.array_equal(copy[:].values, dataset[:].values)
    assert json.dumps(dataset._recipe.dtypes) == '["float64"]'  # type: ignore[union-attr]
