"""The command line: what it prints, what it leaves behind, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from hbx_gpu import __version__, cli
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._ingest import tasks
from hbx_gpu.atlas._writing.arrays import codec_names


def write(
    path: Path, seed: int = 0, n: int = 8, genes: str = "abcd", *, scale: float = 1, **obs: list[Any]
) -> Path:
    x = sp.random(n, len(genes), 0.6, "csr", random_state=np.random.default_rng(seed))
    x.data = np.ceil(x.data * 9) * scale
    frame = pd.DataFrame(obs, index=[f"s{seed}c{i}" for i in range(n)])
    adata = anndata.AnnData(x.astype(np.float32), obs=frame, var=pd.DataFrame(index=list(genes)))
    adata.layers["spliced"] = adata.X.copy()
    adata.write_h5ad(path)
    return path


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def test_both_real_files(
    tmp_path: Path, real_h5ad: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ingest", *real_h5ad, "--atlas", tmp_path / "a") == 0
    out, err = capsys.readouterr()
    assert f"{real_h5ad[0]}: 10,000 cells added" in out
    assert f"snapshot 0: 11,107 cells in {tmp_path / 'a'}" in out
    assert "ingest: 100%" in err

    atlas = RaggedAtlas.checkout_latest(tmp_path / "a")
    datasets = atlas.list_datasets().set_index("source_name")
    obs = atlas.query().to_pandas()
    store = zarr.open_group(tmp_path / "a" / "zarr_store", mode="r")
    for path, id_column in zip(real_h5ad, ("gene_ids", None), strict=True):
        adata = anndata.read_h5ad(path)
        row = datasets.loc[path.name]
        group: Any = store[row["zarr_group"]]
        np.testing.assert_array_equal(group["csr/indices"][:], adata.X.indices)
        np.testing.assert_array_equal(group["csr/layers/counts"][:], adata.X.data)
        assert group["csr/layers/counts"].dtype == np.uint32
        rows = obs[obs["dataset_uid"] == row["dataset_uid"]]
        assert rows["obs_name"].tolist() == adata.obs_names.tolist()
        ids = adata.var[id_column] if id_column else adata.var_names
        assert set(ids) <= set(atlas.feature_registry("gene_expression")["uid"])

    assert run("ingest", *real_h5ad, "--atlas", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [f"{path}: already ingested, skipped" for path in real_h5ad]

    assert run("info", tmp_path / "a") == 0
    out = capsys.readouterr().out
    for text in (
        "cells      11,107",
        "1,507 features",
        "mouse_10k_cells_x_1k_genes.h5ad",
        "691,914",
        "counts",
    ):
        assert text in out
    assert "hbx_gpu.rowpack" in out
    assert "pointer into gene_expression" in out


def test_options_reach_the_ingest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "f.h5ad", scale=0.5)
    options = (
        "--layer",
        "spliced",
        "--target-layer",
        "log_normalized",
        "--codec",
        "gzip",
        "--table",
        "spots",
    )
    more = (
        "--field",
        "gene_expression",
        "--feature-id-column",
        "index",
        "--chunk-size",
        8,
        "--shard-size",
        16,
    )
    assert run("ingest", path, "--atlas", tmp_path / "a", *options, *more) == 0
    atlas = RaggedAtlas.checkout_latest(tmp_path / "a")
    row = atlas.list_datasets().iloc[0]
    assert (row["source_matrix"], row["zarr_layer"], row["codec"]) == ("spliced", "log_normalized", "gzip")
    assert atlas.obs_tables == ["spots"]
    array = zarr.open_array(tmp_path / "a" / "zarr_store" / row["zarr_group"] / "csr/indices", mode="r")
    assert (array.chunks, array.shards) == ((8,), (16,))
    # The atlas remembers its codec.
    capsys.readouterr()
    assert run("ingest", write(tmp_path / "g.h5ad", 1), "--atlas", tmp_path / "a") == 0
    assert RaggedAtlas.checkout_latest(tmp_path / "a").list_datasets()["codec"].tolist() == ["gzip", "gzip"]
    assert run("ingest", path, "--atlas", tmp_path / "a") == 1
    assert "ingested differently: source_matrix was 'spliced', is 'X'" in capsys.readouterr().err


def test_the_matrix_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (write(tmp_path / f"{name}.h5ad", seed) for seed, name in enumerate("abc"))
    atlas = tmp_path / "A"
    assert run("ingest", f"{a}:layers/spliced", f"{b}:auto", c, "--atlas", atlas, "--layer", "X") == 0
    datasets = RaggedAtlas.checkout_latest(atlas).list_datasets()
    assert datasets["source_matrix"].tolist() == ["spliced", "X", "X"]
    with pytest.raises(SystemExit):
        run("ingest", a, f"{a}:spliced", "--atlas", tmp_path / "B")
    assert "a.h5ad is given twice" in capsys.readouterr().err
    assert run("ingest", f"{a}:nothing", "--atlas", tmp_path / "B") == 1
    assert "has no matrix 'nothing'" in capsys.readouterr().err
    assert run("convert", f"{a}:layers/spliced", tmp_path / "archive") == 0
    assert "matrix spliced" in capsys.readouterr().out
    assert run("convert", f"{a}:X", tmp_path / "other", "--layer", "raw") == 1
    assert "give one of them" in capsys.readouterr().err


def test_a_failing_file_keeps_the_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, never = write(tmp_path / "good.h5ad"), tmp_path / "bad.h5ad", write(tmp_path / "never.h5ad", 2)
    bad.write_text("no h5ad")
    assert run("ingest", good, bad, never, "--atlas", tmp_path / "a") == 1
    out, err = capsys.readouterr()
    assert "snapshot 0: 8 cells" in out
    assert err.splitlines()[-1].startswith(f"hbx-gpu: error: {bad} is not an HDF5 file")
    assert "Traceback" not in err
    assert RaggedAtlas.checkout_latest(tmp_path / "a").query().count() == 8
    assert run("ingest", good, write(bad, 1), never, "--atlas", tmp_path / "a") == 0
    assert RaggedAtlas.checkout_latest(tmp_path / "a").query().count() == 24


def test_an_error_without_the_file_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tasks, "_write", full)
    path = write(tmp_path / "f.h5ad")
    assert run("ingest", path, "--atlas", tmp_path / "a") == 1
    assert f"hbx-gpu: error: {path}: [Errno 28] No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space left"):
        run("ingest", path, "--atlas", tmp_path / "a", "--debug")


def test_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "_write", stop)
    assert run("ingest", write(tmp_path / "f.h5ad"), "--atlas", tmp_path / "a") == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_files_make_no_atlas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ingest", tmp_path / "nope.h5ad", "--atlas", tmp_path / "a") == 1
    assert f"error: no such file: {tmp_path / 'nope.h5ad'}" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_snapshot_can_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "f.h5ad")
    assert run("ingest", path, "--atlas", tmp_path / "a", "--no-snapshot") == 0
    assert "snapshot 0" not in capsys.readouterr().out
    assert run("info", tmp_path / "a") == 1
    assert "No snapshots found" in capsys.readouterr().err
    assert run("ingest", path, "--atlas", tmp_path / "a") == 0
    assert "already ingested, skipped\nsnapshot 0: 8 cells" in capsys.readouterr().out


def test_columns_that_disagree(tmp_path: Path) -> None:
    first = write(tmp_path / "1.h5ad", batch=[1] * 8)
    second = write(tmp_path / "2.h5ad", 1, batch=["b"] * 8)
    assert run("ingest", first, second, "--atlas", tmp_path / "a") == 0
    assert RaggedAtlas.checkout_latest(tmp_path / "a").query().count("batch")["batch"].tolist() == ["1", "b"]


@pytest.mark.parametrize(
    "name",
    [
        "ragged_rna",
        "all_spaces",
        "cite_multimodal",
        "image_tiles",
        "legacy_0_2_3",
        "seed_2026_05",
        "uid_collision",
    ],
)
def test_info_on_real_atlases(homeobox_fixtures: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", homeobox_fixtures / name / "atlas") == 0
    out = capsys.readouterr().out
    assert "snapshot   " in out
    assert "datasets" in out
    assert "unreadable" not in out


def test_info_on_a_snapshot(homeobox_fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = homeobox_fixtures / "ragged_rna" / "atlas"
    assert run("info", root, "--version", 0) == 0
    assert "cells      40" in capsys.readouterr().out
    assert run("info", root, "--version", 7) == 1
    assert "version 7 not found" in capsys.readouterr().err
    assert run("info", root / "nothing") == 1
    assert "No atlas found" in capsys.readouterr().err


def test_help_and_version_are_light() -> None:
    code = (
        "import sys\nfrom hbx_gpu import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'lancedb', 'zarr', 'numpy', 'torch', 'anndata', 'pandas'} & set(sys.modules)))"
    )
    for args in (["--version"], ["ingest", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in codec_names())
    done = subprocess.run(
        [sys.executable, "-m", "hbx_gpu", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"hbx-gpu {__version__}\n"


def test_usage_errors() -> None:
    for args in ([], ["ingest"], ["ingest", "x.h5ad"], ["frobnicate"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2


# Several modalities


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """RNA of cells s0c0 .. s0c7; proteins of s0c0 .. s0c9, with a second layer in halves."""
    first = write(tmp_path / "rna.h5ad", batch=["k"] * 8)
    second = write(tmp_path / "adt.h5ad", n=10, genes="pqr")
    adata = anndata.read_h5ad(second)
    adata.layers["dsb"] = adata.X.toarray() / 2
    adata.write_h5ad(second)
    return first, second


def test_modalities(tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "ingest",
        "--atlas",
        tmp_path / "a",
        "--modality",
        f"rna={two[0]}",
        "--modality",
        f"protein={two[1]}",
    ]
    layers = ["--layer-of", "protein:counts=X", "--layer-of", "protein:dsb_normalized=layers/dsb"]
    assert run(*args, *layers) == 0
    out, err = capsys.readouterr()
    assert f"rna={two[0]}, protein={two[1]}: 10 cells added" in out
    assert "8 cells have all modalities" in out
    assert "gene_expression: 8 cells, 2 cells lack it" in out
    assert "protein_abundance: 10 cells\n" in out
    assert "snapshot 0: 10 cells" in out
    assert "100%" in err
    atlas = RaggedAtlas.checkout_latest(tmp_path / "a")
    assert set(atlas.pointer_fields) == {"gene_expression", "protein_abundance"}
    datasets = atlas.list_datasets().set_index("feature_space")
    assert datasets["dataset_uid"].nunique() == 1
    store = zarr.open_group(tmp_path / "a" / "zarr_store", mode="r")
    group: Any = store[datasets.loc["protein_abundance", "zarr_group"]]
    adata = anndata.read_h5ad(two[1])
    np.testing.assert_array_equal(group["layers/counts"][:], adata.X.toarray())
    np.testing.assert_array_equal(group["layers/dsb_normalized"][:], adata.layers["dsb"])
    assert atlas.query().to_cell_dataset("gene_expression").n_cells == 8

    assert run(*args, *layers) == 0
    assert "already ingested, skipped" in capsys.readouterr().out
    assert run(*args, "--join", "inner") == 1
    assert "modality_join was 'outer', is 'inner'" in capsys.readouterr().err


def test_modalities_that_do_not_match(
    tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ingest", "--atlas", tmp_path / "a", "--modality", f"rna={two[0]}", "--modality", f"adt={two[1]}"]
    assert run(*args, "--join", "exact") == 1
    assert "2 cell id(s) of 'adt'" in capsys.readouterr().err
    assert run(*args, "--join", "inner", "--codec", "zstd") == 0
    out = capsys.readouterr().out
    assert "protein_abundance: 8 cells, 2 ids left out" in out
    assert run("ingest", "--atlas", tmp_path / "b", "--modality", f"rna={tmp_path}/no.h5ad") == 1
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run("ingest", "--atlas", tmp_path / "b", "--modality", f"velocity={two[0]}") == 1
    assert "unknown modality 'velocity'" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_mudata_file(tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    mudata = pytest.importorskip("mudata")
    path = tmp_path / "m.h5mu"
    mudata.MuData({"rna": anndata.read_h5ad(two[0]), "prot": anndata.read_h5ad(two[1])}).write(path)
    assert run("ingest", path, "--atlas", tmp_path / "a") == 0
    assert f"{path}: 10 cells added" in capsys.readouterr().out
    # One modality beside those of the file.
    np.save(tmp_path / "t.npy", np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4))
    (tmp_path / "t.csv").write_text("cell_id,tile\ns0c3,1\n")
    more = ["--modality", f"tiles={tmp_path / 't.npy'}", "--tiles-table", tmp_path / "t.csv"]
    assert run("ingest", path, "--atlas", tmp_path / "b", *more) == 0
    assert "image_tiles: 1 cells, 9 cells lack it" in capsys.readouterr().out
    assert RaggedAtlas.checkout_latest(tmp_path / "b").pointer_fields.keys() == {
        "gene_expression",
        "protein_abundance",
        "image_tiles",
    }


def test_fragments_with_barcodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.tsv").write_text("chr1\t1\t5\tAA\nchr2\t1\t5\tCC\n")
    (tmp_path / "b.txt").write_text("CC\n")
    args = ["--modality", f"atac={tmp_path / 'f.tsv'}", "--barcodes", tmp_path / "b.txt"]
    assert run("ingest", "--atlas", tmp_path / "a", *args) == 0
    assert "snapshot 0: 1 cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name files, or modalities"),
        (["f.h5ad", "--modality", "rna=g.h5ad"], "--modality goes with at most one FILE"),
        (["f.h5ad", "--join", "inner"], "--join: for modalities only"),
        (
            ["--modality", "rna=g.h5ad", "--layer", "raw"],
            "--layer is for one matrix; with modalities use --layer-of",
        ),
        (["--modality", "g.h5ad"], "expected NAME=VALUE"),
        (["--modality", "rna=g.h5ad", "--modality", "rna=h.h5ad"], "rna is given twice"),
    ],
)
def test_usage_of_modalities(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("ingest", "--atlas", "a", *args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
