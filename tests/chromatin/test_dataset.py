"""`FragmentMatrixDataset`: counts of fragments in memory and in real atlases, through loaders and workers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.atlas import AtlasQuery, RaggedAtlas
from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin import Bins, FragmentMatrixDataset, Peaks, fragments_frame, fragments_of
from hbx_gpu.chromatin._reference import reference_counts
from hbx_gpu.dataloader import (
    MultimodalCellDataset,
    make_loader,
    multimodal_to_dense_collate,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.sampler import CellSampler
from tests.chromatin.cases import NAMES, InMemory, dense
from tests.emulation.backend import EmulatedBackend

ROWS = [[(0, 5, 3), (3, 12, 9)], [], [(2, 7, 1), (0, 1, 1), (0, 19, 4)], [(3, 4, 6)]]
COUNTS = [[1, 0, 0, 0, 1, 1], [0] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
BINS = Bins(10, {"chr1": 30, "chrX": 30})
FIELD = "chromatin_accessibility"


def in_memory(rows: Any) -> Any:
    """Fragments that have of a dataset what counting takes."""
    return InMemory(rows)


@pytest.fixture
def counted() -> FragmentMatrixDataset:
    return FragmentMatrixDataset(in_memory(ROWS), BINS, chromosome_names=NAMES)


def test_it_looks_like_a_sparse_dataset(counted: FragmentMatrixDataset) -> None:
    assert (len(counted), counted.n_cells, counted.n_features) == (4, 4, 6)
    assert counted.feature_uids.tolist()[:4] == ["chr1:0-10", "chr1:10-20", "chr1:20-30", "chrX:0-10"]
    assert counted.groups_np.tolist() == [0, 1, 0, 1]
    assert counted.columns["label"].tolist() == [0, 3, 6, 9]
    assert counted.categories.keys() == {"label"}
    assert counted.present.all()
    assert counted.row_numbers([-1]).tolist() == [3]
    assert counted.dtype == np.uint32
    assert counted.batch_nbytes([0, 1]) == 40
    assert "4 cells x Regions(6 bins of 10 bases, fragments)" in repr(counted)
    with pytest.raises(AttributeError):
        _ = counted.nothing_of_the_kind  # type: ignore[attr-defined]


def test_batches(counted: FragmentMatrixDataset) -> None:
    assert dense(counted[:]).tolist() == COUNTS
    assert dense(counted[2]).tolist() == [COUNTS[2]]
    batch = counted.__getitems__([3, 0, 3, -2])
    assert dense(batch).tolist() == [COUNTS[i] for i in (3, 0, 3, 2)]
    assert batch.metadata is not None
    assert batch.metadata["label"].tolist() == [9, 0, 9, 6]
    first, second = counted.read_batches([[1], [0, 2]])
    assert dense(first).tolist() == [COUNTS[1]]
    assert dense(second).tolist() == [COUNTS[0], COUNTS[2]]


def test_names_default_to_uids_and_must_fit() -> None:
    by_uid = FragmentMatrixDataset(in_memory(ROWS), Peaks([("u3", 0, 100)]))
    assert dense(by_uid[:]).tolist() == [[1], [0], [0], [1]]
    with pytest.raises(InvalidDataError, match="2 chromosome names for a dataset of 4"):
        FragmentMatrixDataset(in_memory(ROWS), BINS, chromosome_names=["chr1", "chrX"])


def test_names_and_sizes_as_registered() -> None:
    frame = pd.DataFrame(
        {"sequence_name": ["chr1", "chr10", "chr2", "chrX"], "sequence_length": [30, 5, 6, 30]},
        index=["u0", "u1", "u2", "u3"],
    )
    counted = FragmentMatrixDataset.registered(in_memory(ROWS), Bins(10), frame)
    assert counted.n_features == 3 + 1 + 1 + 3
    assert dense(counted[0]).tolist() == [[1, 0, 0, 0, 0, 0, 1, 1]]


def test_sizes_as_observed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hbx_gpu")
    counted = FragmentMatrixDataset(in_memory(ROWS), Bins(10, "observed"), chromosome_names=NAMES)
    assert "reading all fragments" in caplog.text
    assert counted.feature_uids.tolist() == [
        "chr1:0-10",
        "chr1:10-20",
        "chr1:20-23",
        "chrX:0-10",
        "chrX:10-20",
        "chrX:20-21",
    ]


def test_pickled(counted: FragmentMatrixDataset) -> None:
    again = pickle.loads(pickle.dumps(counted))
    assert dense(again[:]).tolist() == COUNTS
    assert again.feature_uids.tolist() == counted.feature_uids.tolist()


@pytest.mark.parametrize("name", ["with_layers", "device_engine", "table", "sources"])
def test_nothing_of_the_fragments_shows_through(query: AtlasQuery, name: str) -> None:
    counted = of_atlas(query, MATRICES[0])
    assert hasattr(counted.fragments, name)
    with pytest.raises(AttributeError, match=f"'FragmentMatrixDataset' object has no attribute '{name}'"):
        getattr(counted, name)


# Real fragments


@pytest.fixture(scope="module")
def query(homeobox_fixtures: Path) -> AtlasQuery:
    return fresh(homeobox_fixtures)


def fresh(homeobox_fixtures: Path) -> AtlasQuery:
    return RaggedAtlas.checkout_latest(homeobox_fixtures / "all_spaces" / "atlas").query("cells")


@pytest.fixture(scope="module")
def expected(homeobox_fixtures: Path) -> dict[str, Any]:
    with np.load(homeobox_fixtures / "all_spaces" / "expected_v0__cells.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def stored(expected: dict[str, Any], rows: Any) -> SparseBatch:
    """The expectation for some rows, as a batch of fragments."""
    offsets = expected[f"{FIELD}/offsets"]
    at = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows] or [np.empty(0, np.int64)])
    starts, lengths = expected[f"{FIELD}/starts"][at], expected[f"{FIELD}/lengths"][at]
    return SparseBatch(
        indices=expected[f"{FIELD}/chromosomes"][at],
        values=starts,
        offsets=np.concatenate([[0], np.cumsum(np.diff(offsets)[list(rows)])]).astype(np.int64),
        n_features=4,
        layers={"starts": starts, "lengths": lengths},
    )


def of_atlas(query: AtlasQuery, matrix: Bins | Peaks, **kwargs: Any) -> FragmentMatrixDataset:
    cells = query.to_cell_dataset(FIELD, layer=["starts", "lengths"], **kwargs)
    return FragmentMatrixDataset.registered(cells, matrix, query.selection.snapshot.registry(FIELD).frame)


MATRICES: Any = [
    Bins(5000, "observed"),
    Bins(100_000, {"chrX": 2_000_000, "chr1": 2_000_000}, count="insertions"),
    Bins(20_000, {"chr10": 2_000_000}, count="paired"),
    Peaks([("chr2", k, k + 40_000) for k in range(0, 2_000_000, 25_000)], count="binary"),
]


@pytest.mark.parametrize("matrix", MATRICES, ids=repr)
def test_counts_of_an_atlas(query: AtlasQuery, expected: dict[str, Any], matrix: Bins | Peaks) -> None:
    counted = of_atlas(query, matrix)
    assert len(counted) == 14
    for rows in (range(14), [13, 0, 13, 5], []):
        batch = counted.__getitems__(np.array(rows, np.int64))
        wanted = reference_counts(stored(expected, rows), counted.regions)
        assert np.array_equal(dense(batch), wanted)
    assert wanted.shape == (0, counted.n_features)
    assert dense(counted[:]).sum() > 0


def test_made_by_a_query(homeobox_fixtures: Path, expected: dict[str, Any]) -> None:
    matrix = Bins(100_000, {"chrX": 2_000_000, "chr1": 2_000_000}, count="insertions")
    wanted = reference_counts(stored(expected, range(14)), of_atlas(fresh(homeobox_fixtures), matrix).regions)
    counted = fresh(homeobox_fixtures).to_cell_dataset(FIELD, matrix=matrix, metadata_columns=["uid"])
    assert isinstance(counted, FragmentMatrixDataset)
    for dataset in (counted, pickle.loads(pickle.dumps(counted))):
        batch: Any = dataset[:]
        assert np.array_equal(dense(batch), wanted)
        uids = dataset.categories["uid"][batch.metadata["uid"]]
        assert uids.tolist() == expected["uid"][expected[f"{FIELD}/present"]].tolist()
    both = fresh(homeobox_fixtures).to_multimodal_dataset(["adt", FIELD], matrices={FIELD: matrix})
    assert both.n_features == {"adt": 6, FIELD: 40}
    batch = both[:]
    present = batch.present[FIELD]
    assert np.array_equal(dense(batch.modalities[FIELD])[present], wanted)
    tensors = multimodal_to_dense_collate(batch)[FIELD]["X"].numpy()
    assert np.array_equal(tensors[present], wanted)
    assert not tensors[~present].any()


def test_every_fragment_lies_in_some_observed_bin(query: AtlasQuery, expected: dict[str, Any]) -> None:
    counted = of_atlas(query, Bins(5000, "observed", count="insertions"))
    assert counted.regions.chromosomes.tolist() == ["chr1", "chr10", "chr2", "chrX"]
    assert dense(counted[:]).sum() == 2 * (expected[f"{FIELD}/lengths"] > 0).sum()


def test_bins_of_an_atlas_that_registers_no_sizes(query: AtlasQuery) -> None:
    with pytest.raises(InvalidDataError, match=r"'chr1', 'chr10', 'chr2', 'chrX'.*chromosome_sizes"):
        of_atlas(query, Bins(5000))


def test_chosen_chromosomes(homeobox_fixtures: Path) -> None:
    query = fresh(homeobox_fixtures).features(["uchrX", "uchr1"], FIELD)
    counted = of_atlas(query, Bins(100_000, "observed"))
    assert counted.regions.chromosomes.tolist() == ["chrX", "chr1"]
    whole = of_atlas(fresh(homeobox_fixtures), Bins(100_000, "observed"))
    column = {uid: i for i, uid in enumerate(whole.feature_uids)}
    picked = [column[uid] for uid in counted.feature_uids]
    assert np.array_equal(dense(counted[:]), dense(whole[:])[:, picked])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaded_as_any_sparse_dataset(query: AtlasQuery, num_workers: int) -> None:
    counted = of_atlas(query, Bins(100_000, "observed"), metadata_columns=["uid"])
    whole = dense(counted[:])
    sampler = CellSampler(counted.groups_np, batch_size=5, seed=1, num_workers=num_workers)
    rows = np.concatenate([list(batch) for batch in sampler])
    loader = make_loader(counted, sampler, collate_fn=sparse_to_dense_collate)
    batches = list(loader)
    loader.close()
    assert np.array_equal(torch.cat([batch["X"] for batch in batches]).numpy(), whole[rows])
    assert all(batch["X"].dtype == torch.float32 for batch in batches)


def test_layouts(query: AtlasQuery) -> None:
    counted = of_atlas(query, MATRICES[3])
    whole = dense(counted[:])
    for layout in ("dense", "csr"):
        sampler = CellSampler(counted.groups_np, batch_size=4, seed=2, num_workers=0)
        with make_loader(counted, sampler, layout=layout, executor="direct") as loader:
            for batch in loader:
                x = batch["X"].to_dense() if layout == "csr" else batch["X"]
                assert np.array_equal(x.numpy(), whole[batch["index"].numpy()])


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_on_a_device(query: AtlasQuery, layout: str) -> None:
    counted = of_atlas(query, MATRICES[1])
    whole = dense(counted[:])
    rows = [[3, 1], [13, 0, 3]]
    with device_loader(counted, rows, EmulatedBackend(), LoaderOptions(layout=layout)) as loader:
        for batch, wanted in zip(loader, rows, strict=True):
            x = batch["X"].to_dense() if layout == "csr" else batch["X"]
            assert np.array_equal(x.numpy(), whole[wanted])
            assert batch["index"].tolist() == wanted


def test_another_reader(query: AtlasQuery) -> None:
    counted = of_atlas(query, MATRICES[1])
    other = counted.reading_with(counted.open_reader("preadv"))
    assert isinstance(other, FragmentMatrixDataset)
    assert np.array_equal(dense(other[:]), dense(counted[:]))


def test_csr_tensors(query: AtlasQuery) -> None:
    counted = of_atlas(query, MATRICES[0])
    x = sparse_to_csr_collate(counted[:])["X"]
    assert x.shape == (14, counted.n_features)
    assert np.array_equal(x.to_dense().numpy(), dense(counted[:]))


def test_in_a_multimodal_batch(query: AtlasQuery, expected: dict[str, Any]) -> None:
    parts: Any = query.to_multimodal_dataset(["rna", FIELD], layers={FIELD: ["starts", "lengths"]}).datasets
    counted = FragmentMatrixDataset(
        parts[FIELD],
        Bins(100_000, {"chr1": 2_000_000, "chrY": 5}),
        chromosome_names=["chr1", "chr10", "chr2", "chrX"],
    )
    both = MultimodalCellDataset({"rna": parts["rna"], FIELD: counted})
    for dataset in (both, pickle.loads(pickle.dumps(both))):
        batch: Any = dataset.__getitems__(np.arange(len(dataset))[::-1])
        present = expected[f"{FIELD}/present"][::-1]
        assert np.array_equal(batch.present[FIELD], present)
        found = dense(batch.modalities[FIELD])
        wanted = reference_counts(stored(expected, range(14)), counted.regions)[::-1]
        assert np.array_equal(found[present], wanted)
        assert not found[~present].any()
        measured = batch.measured[FIELD]
        assert measured.shape == found.shape
        assert np.array_equal(measured[:, 0], present)
        assert not measured[:, -1].any()  # chrY


def test_intervals_of_an_atlas(query: AtlasQuery, expected: dict[str, Any]) -> None:
    cells: Any = query.to_cell_dataset(FIELD, layer=["starts", "lengths"])
    rows = fragments_of(cells[:])
    flat = np.concatenate(rows)
    assert np.array_equal(flat["chromosome"], expected[f"{FIELD}/chromosomes"])
    assert np.array_equal(flat["start"], expected[f"{FIELD}/starts"])
    assert np.array_equal(flat["end"] - flat["start"], expected[f"{FIELD}/lengths"])
    assert [len(row) for row in rows] == np.diff(expected[f"{FIELD}/offsets"]).tolist()
    uids = expected["uid"][expected[f"{FIELD}/present"]]
    frame = fragments_frame(cells, uids, ["chr1", "chr10", "chr2", "chrX"])
    assert len(frame) == len(flat)
    assert frame.groupby("uid", sort=False).size().reindex(uids, fill_value=0).tolist() == list(
        map(len, rows)
    )
