"""Collections: several archives in one folder, and the one archive made of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu.dataloader import sparse_to_dense_collate
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl import SingleCellCollection, SingleCellMemMapDataset
from hbx_gpu.scdl._format.archive import open_archive
from tests.executors import Twice
from tests.scdl.files import adata, content, counts, h5ad, leftovers

ENSEMBL = [f"ENSG{i:011d}" for i in range(10)]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "h5ad"
    (folder / "deep").mkdir(parents=True)
    h5ad(folder / "b.h5ad", counts(4, 3, seed=1), genes="g", cells="b")
    h5ad(folder / "a.h5ad", counts(5, 3, seed=2), genes="g", cells="a")
    h5ad(folder / "deep" / "c.h5ad", counts(2, 70, seed=3), genes="h", cells="c")
    return folder


def test_empty(tmp_path: Path) -> None:
    collection = SingleCellCollection(tmp_path / "new" / "one")
    assert (
        collection.number_of_rows()
        == collection.number_of_values()
        == collection.number_nonzero_values()
        == 0
    )
    assert collection.shape() == (0, [0])
    assert collection.sparsity() == 0.0
    assert [p.name for p in (tmp_path / "new" / "one").iterdir()] == ["version.json"]
    with pytest.raises(ValueError, match="is empty"):
        collection.flatten(tmp_path / "flat")


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_many_files_in_the_order_of_their_paths(sources: Path, tmp_path: Path, processes: bool) -> None:
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad_multi(sources, max_workers=2, use_processes=processes)
    assert list(collection.fname_to_mmap) == [tmp_path / "all" / name for name in "abc"]
    assert collection.number_of_rows() == 11
    assert collection.number_of_variables() == [3, 70]
    assert collection.number_of_values() == 9 * 3 + 2 * 70
    stored = sum(len(d.data) for d in collection.fname_to_mmap.values())
    assert collection.number_nonzero_values() == stored
    assert collection.sparsity() == (167 - stored) / 167
    again = SingleCellCollection.open(tmp_path / "all")
    assert again.shape() == collection.shape()


def test_any_executor_converts_the_same(sources: Path, tmp_path: Path) -> None:
    """Also one that runs each task twice, and one file of which cannot be read."""
    expected = SingleCellCollection(tmp_path / "expected")
    expected.load_h5ad_multi(sources)
    with ThreadPoolExecutor(2) as threads:
        for name, executor in {"threads": threads, "twice": Twice()}.items():
            collection = SingleCellCollection(tmp_path / name)
            calls: list[tuple[int, int]] = []
            collection.load_h5ad_multi(
                sources, executor=executor, progress=lambda *call, calls=calls: calls.append(call)
            )
            assert calls == [(1, 3), (2, 3), (3, 3)]
            names = [path.name for path in collection.fname_to_mmap]
            assert names == ["a", "b", "c"]
            for name_of in names:
                assert content(tmp_path / name / name_of) == content(tmp_path / "expected" / name_of)
            assert sorted(path.name for path in (tmp_path / name).iterdir()) == [*names, "version.json"]
        (sources / "b.h5ad").write_bytes(b"junk")
        broken = SingleCellCollection(tmp_path / "broken")
        with pytest.raises(RuntimeError, match=r"Error in processing file .*b\.h5ad: .*not an HDF5"):
            broken.load_h5ad_multi(sources, executor=threads)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["version.json"]


@pytest.mark.filterwarnings("ignore:.* none of its 70 features is among")
@pytest.mark.parametrize("destroy", [False, True])
def test_flatten(sources: Path, tmp_path: Path, destroy: bool) -> None:
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad_multi(str(sources))
    shape = collection.shape()
    rows = [row for path in collection.fname_to_mmap for row in content(path)["rows"]]
    collection.flatten(tmp_path / "flat", destroy_on_copy=destroy)
    flat = SingleCellMemMapDataset(tmp_path / "flat")
    assert flat.shape() == shape
    assert content(tmp_path / "flat")["rows"] == rows
    assert (tmp_path / "all").exists() is not destroy
    # Usable in either case.
    assert collection.number_of_rows() == (0 if destroy else 11)
    with pytest.raises((FileExistsError, ValueError)):
        collection.flatten(tmp_path / "flat")


def test_one_file_is_copied_not_moved(sources: Path, tmp_path: Path) -> None:
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad(sources / "a.h5ad")
    collection.flatten(tmp_path / "flat")
    assert content(tmp_path / "flat")["rows"] == content(tmp_path / "all" / "a")["rows"]


def test_flatten_onto_an_archive(sources: Path, tmp_path: Path) -> None:
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad(sources / "a.h5ad")
    for _ in range(2):
        collection.flatten(tmp_path / "flat", overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite"):
        collection.flatten(tmp_path / "flat")
    assert not leftovers(tmp_path)


def test_equal_names(sources: Path, tmp_path: Path) -> None:
    h5ad(sources / "deep" / "a.h5ad", counts(3, 3))
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad_multi(sources)
    assert [p.name for p in collection.fname_to_mmap] == ["a", "b", "deep__a", "c"]


def test_dtypes_and_neighbors(tmp_path: Path) -> None:
    folder = tmp_path / "h5ad"
    folder.mkdir()
    for i in range(2):
        data = adata(counts(4, 3, seed=i))
        data.obsp["near"] = sp.random(4, 4, 0.5, "csr", random_state=i, dtype=np.float32)
        data.write_h5ad(folder / f"{i}.h5ad")
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad_multi(folder, data_dtype="auto", load_neighbors=True, neighbor_key="near")
    collection.flatten(tmp_path / "flat")
    assert open_archive(tmp_path / "flat").data.dtype == np.uint8
    one = content(tmp_path / "all" / "1")["neighbors"]
    assert content(tmp_path / "flat")["neighbors"][4:] == [([n + 4 for n in near], w) for near, w in one]
    assert collection.fname_to_mmap[tmp_path / "all" / "1"].get_neighbor_stats()["has_neighbors"]


def test_errors(sources: Path, tmp_path: Path) -> None:
    collection = SingleCellCollection(tmp_path / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="There a no h5ad files in"):
        collection.load_h5ad_multi(tmp_path / "empty")
    (sources / "b.h5ad").write_bytes(b"junk")
    with pytest.raises(RuntimeError, match=r"Error in processing file .*b\.h5ad: .*not an HDF5"):
        collection.load_h5ad_multi(sources)
    # Nothing is left that would hinder the next try.
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["version.json"]
    assert collection.fname_to_mmap == {}
    (sources / "b.h5ad").unlink()
    collection.load_h5ad_multi(sources)
    with pytest.raises(FileExistsError):
        collection.load_h5ad(sources / "a.h5ad")
    with pytest.raises(FileNotFoundError, match="SCDL archives"):
        SingleCellCollection.open(tmp_path / "empty")


def two_namings(tmp_path: Path, second: list[str]) -> tuple[SingleCellCollection, list[sp.csr_matrix]]:
    """A collection of two archives whose genes are named by Ensembl ids, in the second as given."""
    folder = tmp_path / "h5ad"
    folder.mkdir()
    matrices = [counts(4, 3, seed=1), counts(5, 3, seed=2)]
    for name, x, ids in zip("ab", matrices, (ENSEMBL[:3], second), strict=True):
        data = adata(x, cells=name)
        data.var_names, data.var["feature_id"] = ids, ids
        data.write_h5ad(folder / f"{name}.h5ad")
    collection = SingleCellCollection(tmp_path / "all")
    collection.load_h5ad_multi(folder)
    return collection, matrices


@pytest.mark.filterwarnings("ignore:.* only 1 of its 3 features are among")
def test_flatten_refuses_archives_that_share_too_few_genes(tmp_path: Path) -> None:
    collection, matrices = two_namings(tmp_path, [ENSEMBL[2], *ENSEMBL[7:9]])
    with pytest.raises(InvalidDataError, match=r"only 1 of its 3 features .*require_shared_genes=0\.5"):
        collection.flatten(tmp_path / "flat", require_shared_genes=0.5)
    assert not (tmp_path / "flat").exists()
    collection.flatten(tmp_path / "enough", require_shared_genes=0.3)
    assert len(content(tmp_path / "enough")["rows"]) == 9
    with pytest.warns(UserWarning, match="only 1 of its 3 features"):
        collection.flatten(tmp_path / "flat")
    archive = open_archive(tmp_path / "flat")
    assert archive.data.tolist() == [v for x in matrices for v in x.data]


def test_genes_of_a_collection_meet_without_their_versions(tmp_path: Path) -> None:
    order = [2, 0, 1]
    collection, (first, second) = two_namings(tmp_path, [f"{ENSEMBL[i]}.{i + 1}" for i in order])
    with pytest.warns(UserWarning, match="Without versions, 3 are shared"):
        apart = collection.to_cell_dataset()
    assert apart.n_features == 6
    with pytest.raises(InvalidDataError, match=r"require_shared_genes=0\.9"):
        collection.to_cell_dataset(require_shared_genes=0.9)
    dataset: Any = collection.to_cell_dataset(strip_versions=True, require_shared_genes=0.9)
    assert dataset.feature_uids.tolist() == ENSEMBL[:3]
    wanted = np.zeros((9, 3), np.float32)
    wanted[:4], wanted[4:, order] = first.toarray(), second.toarray()
    assert np.array_equal(sparse_to_dense_collate(dataset[:])["X"].numpy(), wanted)
