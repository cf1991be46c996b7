"""The query steps over stores: equal to pandas and scipy on the same data, in a spawned worker too."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import hbx_gpu
from hbx_gpu import CellSampler, make_loader, sparse_to_dense_collate
from hbx_gpu._inplace.cells import Cells
from hbx_gpu.errors import (
    InvalidDataError,
    RemotePathError,
    UnknownNameError,
    UnsafePathError,
    UnsupportedCodecError,
    UnsupportedError,
)


def adata(seed: int, n_obs: int, genes: list[str], **obs: Any) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(1.0, (n_obs, len(genes))).astype(np.float32))
    frame = pd.DataFrame(obs, index=[f"{seed}-{k}" for k in range(n_obs)])
    var = pd.DataFrame({"symbol": [name.lower() for name in genes]}, index=genes)
    return anndata.AnnData(x, obs=frame, var=var, layers={"counts": x * 2})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[anndata.AnnData]]:
    """Two stores of different kinds, genes in other orders, columns of other types."""
    folder = tmp_path_factory.mktemp("stores")
    types = pd.Categorical(["T", "B", "T", "NK"] * 5)
    a = adata(1, 20, ["G1", "G2", "G3", "G4"], cell_type=types, n=np.arange(20), only_a=["x"] * 20)
    b = adata(2, 15, ["G3", "G5", "G1"], cell_type=["T", "mono", None] * 5, n=np.arange(15) / 2)
    a.write_h5ad(folder / "a.h5ad")
    b.write_zarr(folder / "b.zarr")
    return [folder / "a.h5ad", folder / "b.zarr"], [a, b]


def dense(dataset: Any, names: list[str]) -> np.ndarray:
    batch = dataset[np.arange(len(dataset))]
    matrix = sp.csr_matrix(
        (batch.values, batch.indices, batch.offsets), shape=(len(dataset), dataset.n_features)
    )
    place = {uid: k for k, uid in enumerate(dataset.feature_uids)}
    result: np.ndarray = matrix.toarray()[:, [place[name] for name in names]]
    return result


def expected(data: list[anndata.AnnData], names: list[str], layer: str = "X") -> np.ndarray:
    frames = [
        pd.DataFrame((d.X if layer == "X" else d.layers[layer]).toarray(), columns=d.var_names) for d in data
    ]
    result: np.ndarray = pd.concat(
        [frame.reindex(columns=names, fill_value=0) for frame in frames]
    ).to_numpy()
    return result


def test_outer_and_inner_joins(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, data = pair
    cells: Any = hbx_gpu.open(paths)
    outer = cells.to_cell_dataset()
    assert outer.feature_uids.tolist() == ["G1", "G2", "G3", "G4", "G5"]
    np.testing.assert_array_equal(dense(outer, outer.feature_uids), expected(data, list(outer.feature_uids)))
    inner = cells.to_cell_dataset(join="inner", layer="counts")
    assert inner.feature_uids.tolist() == ["G1", "G3"]
    np.testing.assert_array_equal(dense(inner, ["G1", "G3"]), expected(data, ["G1", "G3"], "counts"))
    masks = outer.measured_masks(np.array([0, 1]))
    assert masks.tolist() == [[True, True, True, True, False], [True, False, True, False, True]]


def test_a_panel_and_another_column_of_var(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, data = pair
    cells: Any = hbx_gpu.open(paths)
    dataset = cells.features(["g5", "g1"]).to_cell_dataset(feature_id_column="symbol")
    np.testing.assert_array_equal(dense(dataset, ["g5", "g1"]), expected(data, ["G5", "G1"]))
    with pytest.raises(UnknownNameError, match="1 of 2 features are in none of the stores"):
        cells.features(["G1", "nope"]).to_cell_dataset()
    with pytest.raises(UnknownNameError, match="no column 'ensembl'"):
        cells.to_cell_dataset(feature_id_column="ensembl")


def test_conditions_add_up_and_limits_come_after(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, _ = pair
    cells: Any = hbx_gpu.open(paths)
    frame = cells.to_pandas()
    chosen = frame[(frame["cell_type"] == "T") & (frame["n"] > 2)]
    query = cells.where("cell_type = 'T'").where("n > 2")
    assert query.count() == len(chosen)
    assert query.to_pandas().index.tolist() == chosen.index.tolist()
    assert query.limit(3).to_pandas().index.tolist() == chosen.index.tolist()[:3]
    dataset = query.to_cell_dataset(metadata_columns=["cell_type", "only_a"])
    batch: Any = dataset[np.arange(len(dataset))]
    assert {dataset.categories["cell_type"][code] for code in batch.metadata["cell_type"]} == {"T"}
    assert (batch.metadata["only_a"] == -1).sum() == chosen["only_a"].isna().sum()
    counted = cells.count("cell_type").set_index("cell_type")["count"]
    assert counted["T"] == 15
    balanced = cells.where("cell_type IN ('T', 'B')").balanced_limit(6, "cell_type").to_pandas()
    assert balanced["cell_type"].astype(str).value_counts().to_dict() == {"T": 3, "B": 3}
    with pytest.raises(ValueError, match=r"(no|not a) valid filter"):
        cells.where("cell_type ==== 3").count()
    with pytest.raises(UnknownNameError, match="donor"):
        cells.select(["donor"])


def test_limits_take_the_first_rows_of_conditions_with_comments(
    pair: tuple[list[Path], list[anndata.AnnData]],
) -> None:
    cells = hbx_gpu.open(pair[0]).where("n > 2 -- enough").where("cell_type = 'T'")
    chosen = cells.to_pandas().index.tolist()
    assert len(chosen) == 11
    for limit in (0, 1, 9, 11, 12):
        assert cells.limit(limit).to_pandas().index.tolist() == chosen[:limit]


def test_a_missing_number_is_not_a_value_to_balance(tmp_path: Path) -> None:
    adata(3, 9, ["G1"], dose=[1.0, np.nan, 2.0] * 3).write_h5ad(tmp_path / "doses.h5ad")
    balanced = hbx_gpu.open(tmp_path / "doses.h5ad").balanced_limit(9, "dose").to_pandas()
    assert balanced["dose"].tolist() == [1.0, 2.0] * 3


def test_integers_beside_fractions_stay_exact(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, data = pair
    n = hbx_gpu.open(paths).to_pandas()["n"]
    assert n.tolist() == [*data[0].obs["n"].tolist(), *data[1].obs["n"].tolist()]


def test_to_anndata(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, data = pair
    found = hbx_gpu.open(paths).where("n > 1").to_anndata()
    assert found.X.shape == (len(found.obs), 5)
    frame = hbx_gpu.open(paths).to_pandas()
    np.testing.assert_array_equal(found.X.toarray(), expected(data, list(found.var_names))[frame["n"] > 1])


def rows_in_a_process(pickled: bytes, rows: list[int], answer: Any) -> None:
    batch = pickle.loads(pickled)[rows]
    answer.put((batch.indices, batch.values, batch.offsets))


def test_a_spawned_process_reads_the_same(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, _ = pair
    dataset = hbx_gpu.open(paths).where("n > 0").to_cell_dataset()
    rows = [3, 1, 25, 3]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 4_000
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=rows_in_a_process, args=(pickled, rows, answer))
    process.start()
    found = answer.get(timeout=120)
    process.join()
    batch: Any = dataset[rows]
    for mine, other in zip((batch.indices, batch.values, batch.offsets), found, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_recipe_makes_the_dataset_again(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    """What a process does that comes after the temporary folder has gone."""
    paths, _ = pair
    cells: Any = hbx_gpu.open(paths).where("n > 0")
    dataset = cells.features(["G3"]).to_cell_dataset(layer="counts")
    again = dataset._recipe.rebuild()
    a, b = dataset[np.arange(len(dataset))], again[np.arange(len(again))]
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.indices, b.indices)


def test_a_loader_gives_every_cell_once(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, data = pair
    dataset = hbx_gpu.open(paths).to_cell_dataset(metadata_columns=["n"])
    loader = make_loader(
        dataset,
        CellSampler(dataset.groups_np, batch_size=8, seed=0),
        collate_fn=sparse_to_dense_collate,
        num_workers=0,
    )
    total = np.concatenate([batch["X"].numpy() for batch in loader])
    wanted = expected(data, list(dataset.feature_uids))
    assert sorted(map(tuple, total.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_paths_globs_and_folders(pair: tuple[list[Path], list[anndata.AnnData]]) -> None:
    paths, _ = pair
    folder = paths[0].parent
    ways: list[Any] = [[folder], paths, [str(folder / "*")]]
    for opened in [hbx_gpu.open(*way) for way in ways]:
        assert isinstance(opened, Cells)
        assert opened.n_cells == 35
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hbx_gpu.open(folder / "none.h5ad")
    with pytest.raises(FileNotFoundError, match="no path matches"):
        hbx_gpu.open(str(folder / "*.nothing"))
    with pytest.raises(RemotePathError, match="scheme 'ftp'"):
        hbx_gpu.open("ftp://server/a.zarr")


def test_what_is_not_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(InvalidDataError, match="not an HDF5 file"):
        hbx_gpu.open(tmp_path / "text.h5ad")
    (tmp_path / "packed.h5ad").write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(UnsupportedError, match="compressed with gzip"):
        hbx_gpu.open(tmp_path / "packed.h5ad")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidDataError, match="no store that can be opened"):
        hbx_gpu.open(tmp_path / "empty")


def test_an_atlas_is_opened_as_its_query(
    tmp_path: Path, pair: tuple[list[Path], list[anndata.AnnData]]
) -> None:
    from hbx_gpu import cli

    assert cli.main(["ingest", str(pair[0][0]), "--atlas", str(tmp_path / "atlas")]) == 0
    assert hbx_gpu.open(tmp_path / "atlas").count() == 20
    with pytest.raises(UnsupportedError, match="opened alone"):
        hbx_gpu.open(tmp_path / "atlas", pair[0][1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scdl_archives(shared: Path) -> None:
    """The same rows as the room that reads archives."""
    from hbx_gpu.scdl import open_archive
    from hbx_gpu.scdl._sources.cells import to_cell_dataset

    folder = shared / "fixtures" / "scdl"
    found = [path.parent for path in sorted(folder.rglob("row_ptr.npy"))]
    compared = 0
    for path in found:
        try:
            wanted = to_cell_dataset(open_archive(path))
        except Exception:
            continue
        dataset = hbx_gpu.open(path).to_cell_dataset()
        a: Any = wanted[np.arange(len(wanted))]
        b: Any = dataset[np.arange(len(dataset))]
        np.testing.assert_array_equal(a.offsets, b.offsets)
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(wanted.feature_uids[a.indices], dataset.feature_uids[b.indices])
        compared += 1
    assert compared >= 5


def test_links_to_other_files_are_refused(
    tmp_path: Path, pair: tuple[list[Path], list[anndata.AnnData]]
) -> None:
    """A link inside a file would otherwise give bytes of the wrong file."""
    data = pair[1][0].copy()
    data.write_h5ad(tmp_path / "whole.h5ad")
    data.write_h5ad(tmp_path / "linked.h5ad")
    with h5py.File(tmp_path / "linked.h5ad", "a") as file:
        del file["X/data"]
        file["X/data"] = h5py.ExternalLink(str(tmp_path / "whole.h5ad"), "X/data")
    with pytest.raises(UnsafePathError, match=r"leads out of it, to .*whole\.h5ad"):
        hbx_gpu.open(tmp_path / "linked.h5ad")
    with pytest.raises(UnsupportedCodecError, match="is a link to the file"):
        hbx_gpu.open(tmp_path / "linked.h5ad", allow_links=True)


def test_columns_that_no_table_holds_are_left_out_aloud(tmp_path: Path) -> None:
    data = adata(3, 5, ["G1", "G2"], z=np.arange(5) * 1j, n=[1, 2, 3, 4, 2**64 - 1])
    data.obs_names = ["a", "a", "b", "c", "d"]
    data.write_h5ad(tmp_path / "z.h5ad")
    cells = hbx_gpu.open(tmp_path / "z.h5ad")
    with pytest.warns(UserWarning, match="left out|share their name") as said:
        assert cells.to_pandas()["n"].tolist()[-1] == 2**64 - 1
    assert any("column 'z'" in str(w.message) for w in said)
    assert any("share their name" in str(w.message) for w in said)


def opened(folder: Path, *files: anndata.AnnData, **options: Any) -> tuple[list[str], np.ndarray]:
    """Names and values of the columns of files that are opened together."""
    paths = []
    for k, data in enumerate(files):
        paths.append(folder / f"{k}.h5ad")
        data.write_h5ad(paths[-1])
    dataset = hbx_gpu.open(paths).to_cell_dataset(**options)
    names = dataset.feature_uids.tolist()
    return names, dense(dataset, names)


def test_positions_do_not_join_genes_that_a_column_identifies(tmp_path: Path) -> None:
    """As in an atlas: column 0 of one file and column 0 of another are different genes."""
    a, b = adata(1, 4, ["0", "1", "2"]), adata(2, 3, ["0", "1", "2"])
    a.var["gene_ids"] = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
    b.var["gene_ids"] = ["ENSG00000000003", "ENSG00000000009", "ENSG00000000001"]
    with pytest.warns(UserWarning, match=r"told apart by var\['gene_ids'\] \(ids of a database\)"):
        names, values = opened(tmp_path, a, b)
    for data in (a, b):
        data.var_names = data.var["gene_ids"]
    assert sorted(names) == sorted({*a.var_names, *b.var_names})
    np.testing.assert_array_equal(values, expected([a, b], names))


@pytest.mark.parametrize(
    ("other", "advice"),
    [(["G7", "G8"], "name the column that joins them"), (["ENSG00000000001.4"], "strip_versions=True")],
)
def test_stores_that_share_few_features_are_named(tmp_path: Path, other: list[str], advice: str) -> None:
    first = adata(1, 4, ["ENSG00000000001", "ENSG00000000002"])
    with pytest.warns(UserWarning, match=f"none of its .* features is among .*{advice}"):
        names, _ = opened(tmp_path, first, adata(2, 3, other))
    assert names == [*first.var_names, *other]


def test_versions_are_dropped_and_repeated_names_numbered_on_request(tmp_path: Path) -> None:
    first = adata(1, 4, ["ENSG00000000001", "ENSG00000000002"])
    second = adata(2, 3, ["ENSG00000000002.4", "ENSG00000000001.2"])
    names, values = opened(tmp_path, first, second, strip_versions=True)
    second.var_names = [name[:15] for name in second.var_names]
    assert names == first.var_names.tolist()
    np.testing.assert_array_equal(values, expected([first, second], names))

    twice, once = adata(3, 4, ["a", "b", "a"]), adata(4, 2, ["b", "a", "c"])
    twice.var_names = pd.Index(["a", "b", "a"])
    with pytest.raises(InvalidDataError, match="'unique_names' to number repeated names"):
        opened(tmp_path, twice, once)
    names, values = opened(tmp_path, twice, once, feature_id_column="unique_names")
    twice.var_names_make_unique()
    assert names == ["a", "b", "a-1", "c"]
    np.testing.assert_array_equal(values, expected([twice, once], names))


def test_counts_beside_logarithms_are_said(tmp_path: Path) -> None:
    genes = ["G1", "G2", "G3"]
    counts, logs = adata(1, 8, genes), adata(2, 8, genes)
    logs.X.data = np.log1p(logs.X.data / 3).astype(np.float32)
    with pytest.warns(
        UserWarning, match=r"'X' mixes kinds of values: .*0\.h5ad.* holds counts .*1\.h5ad.*layer="
    ):
        opened(tmp_path, counts, logs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path, counts, logs, layer="counts")
        opened(tmp_path, logs, logs)
