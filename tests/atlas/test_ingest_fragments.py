"""Fragments files: every fragment of every cell comes back, sorted; lines that are none are named."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.atlas import FragmentsInput, RaggedAtlas, create_or_open_atlas
from hbx_gpu.atlas._ingest import fragments
from hbx_gpu.atlas._writing.arrays import codec_names
from hbx_gpu.errors import AlreadyIngestedError, InvalidDataError

Fragment = tuple[str, int, int, str]


def write(path: Path, rows: list[Fragment], *, header: str = "", more: str = "\t2") -> Path:
    text = header + "".join(f"{c}\t{s}\t{e}\t{b}{more}\n" for c, s, e, b in rows)
    if path.suffix == ".gz":
        # Two members, as bgzip writes them.
        half = len(text) // 2
        path.write_bytes(gzip.compress(text[:half].encode()) + gzip.compress(text[half:].encode()))
    else:
        path.write_text(text)
    return path


def some(n: int, seed: int = 0, longest: int = 900) -> list[Fragment]:
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 2**31, n)
    lengths = rng.integers(1, longest, n)
    chroms = rng.choice(["chr10", "chr2", "chrX", "chr1", "KI270"], n)
    barcodes = rng.choice(["AA-1", "CC-1", "GG-1", "TT-1"], n)
    rows = zip(chroms, starts, starts + lengths, barcodes, strict=True)
    return [(str(c), int(s), int(e), str(b)) for c, s, e, b in rows]


def read_back(atlas: RaggedAtlas) -> dict[str, list[tuple[str, int, int]]]:
    """Barcode -> its fragments in stored order."""
    store = zarr.open_group(atlas.path / "zarr_store", mode="r")
    layouts = atlas.catalog.layouts().to_pandas()
    rows = {row["zarr_group"]: row for row in atlas.catalog.dataset_rows()}
    found = {}
    for row in atlas.catalog.obs("cells").to_arrow().to_pylist():
        pointer = row["chromatin_accessibility"]
        if pointer is None:
            continue
        layout = rows[pointer["zarr_group"]]["layout_uid"]
        uids = layouts[layouts["layout_uid"] == layout].sort_values("local_index")["feature_uid"].tolist()
        group: Any = store[f"{pointer['zarr_group']}/cell_sorted"]
        part: Any = slice(pointer["start"], pointer["end"])
        starts: Any = group["layers/starts"][part].astype(np.int64)
        ends: Any = starts + group["layers/lengths"][part]
        chroms = [uids[i] for i in group["chromosomes"][part]]
        found[row["obs_name"]] = list(zip(chroms, starts.tolist(), ends.tolist(), strict=True))
    return found


ORDER = ["chr1", "chr2", "chr10", "KI270", "chrX"]


def expected(rows: list[Fragment], barcode: str) -> list[tuple[str, int, int]]:
    own = [(c, s, e) for c, s, e, b in rows if b == barcode]
    return sorted(own, key=lambda f: (ORDER.index(f[0]), f[1], f[2]))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 300),
    codec=st.sampled_from(codec_names()),
    suffix=st.sampled_from(["tsv", "tsv.gz"]),
    bucket=st.sampled_from([1, 30, 1 << 22]),
    longest=st.sampled_from([2, 900, 2**17]),
)
def test_everything_comes_back(
    tmp_path_factory: pytest.TempPathFactory, n: int, codec: str, suffix: str, bucket: int, longest: int
) -> None:
    folder = tmp_path_factory.mktemp("fragments")
    rows = some(n, n, longest)
    path = write(folder / f"f.{suffix}", rows, header="# made here\n# primary_contig=chr1\n")
    atlas = create_or_open_atlas(folder / "a", codec=codec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "_BUCKET", bucket)
        patch.setattr(fragments, "_BLOCK_BYTES", 1000)
        report = atlas.add_multimodal({"atac": path}, chunk_shape=64, shard_shape=128)
    assert read_back(atlas) == {b: expected(rows, b) for b in {row[3] for row in rows}}
    store = zarr.open_group(atlas.path / "zarr_store", mode="r")
    group: Any = store[f"{report.dataset_uid}/chromatin_accessibility"]
    lengths: Any = group["cell_sorted/layers/lengths"]
    assert lengths.dtype == ("uint16" if max(e - s for _, s, e, _ in rows) < 2**16 else "uint32")
    assert group["cell_sorted/chromosomes"].dtype == np.uint8
    assert group["cell_sorted/layers/starts"].dtype == np.uint32
    atlas.optimize()
    assert atlas.snapshot() == 0


def test_only_cells_are_kept(tmp_path: Path) -> None:
    rows = some(200)
    path = write(tmp_path / "f.tsv.gz", rows)
    x = np.ones((3, 2), np.float32)
    rna = anndata.AnnData(x, obs=pd.DataFrame(index=["GG-1", "zz", "AA-1"]))
    atlas = create_or_open_atlas(tmp_path / "a")
    report = atlas.add_multimodal({"rna": rna, "atac": path})
    assert report.n_measured == {"gene_expression": 3, "chromatin_accessibility": 2}
    assert report.n_left_out["chromatin_accessibility"] == 2
    assert read_back(atlas) == {b: expected(rows, b) for b in ("GG-1", "AA-1")}
    group: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")[report.dataset_uid]
    kept = sum(row[3] in ("GG-1", "AA-1") for row in rows)
    assert group["chromatin_accessibility/cell_sorted/chromosomes"].shape == (kept,)
    with pytest.raises(AlreadyIngestedError, match="nothing was added"):
        atlas.add_multimodal({"rna": rna, "atac": path})


@pytest.mark.parametrize("as_file", [False, True])
def test_barcodes_say_what_cells_are(tmp_path: Path, as_file: bool) -> None:
    rows = some(100)
    path = write(tmp_path / "f.tsv", rows, more="")
    (tmp_path / "b.tsv").write_text("CC-1\nTT-1\nnone\n")
    barcodes: Any = tmp_path / "b.tsv" if as_file else ["CC-1", "TT-1", "none"]
    atlas = create_or_open_atlas(tmp_path / "a")
    report = atlas.add_multimodal({"atac": FragmentsInput(path, barcodes)})
    assert report.n_cells == 2
    assert read_back(atlas) == {b: expected(rows, b) for b in ("CC-1", "TT-1")}


def test_exact_ignores_barcodes_of_no_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv", some(100))
    x = np.ones((2, 2), np.float32)
    atlas = create_or_open_atlas(tmp_path / "a")
    both = anndata.AnnData(x, obs=pd.DataFrame(index=["GG-1", "zz"]))
    with pytest.raises(InvalidDataError, match=r"1 cell id\(s\) of 'rna' .* are not in 'atac'.*\['zz'\]"):
        atlas.add_multimodal({"rna": both, "atac": path}, join="exact")
    both = anndata.AnnData(x, obs=pd.DataFrame(index=["GG-1", "CC-1"]))
    assert atlas.add_multimodal({"rna": both, "atac": path}, join="exact").n_complete == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\t5\t9\n", "at least 4 tab-separated columns .*, the first line has 3"),
        ("chr1\t5\t9\tA\nchr1\tx\t9\tA\n", "cannot read the fragments after number 0: .*'x'"),
        ("chr1\t5\t9\tA\nchr1\t5\n", "cannot read the fragments after number 0: .*Expected 4 columns, got 2"),
        ("chr1\t5\t9\tA\nchr1\t9\t9\tA\n", "fragment 2 runs from 9 to 9; expected 0 <= start < end"),
        ("chr1\t-5\t9\tA\n", "fragment 1 runs from -5 to 9"),
        ("chr1\t5\t4294967296\tA\n", "fragment 1 runs from 5 to 4294967296"),
        ("chr1\t5\t9\tA\nchr1\t5\t9\t\n", "fragment 2 has no barcode"),
        ("", "holds no fragments: nothing to ingest"),
        ("# only\n", "holds no fragments"),
        ("".join(f"s{i}\t1\t2\tA\n" for i in range(300)), "300 chromosomes, .* at most 256; leave out"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.tsv").write_text(text)
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=message):
        atlas.add_multimodal({"atac": tmp_path / "f.tsv"})
    assert not atlas.catalog.dataset_rows()


def test_refused_files(tmp_path: Path) -> None:
    path = write(tmp_path / "f.tsv.gz", some(3000))
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"expected a fragments file at .*g\.tsv; it is missing"):
        atlas.add_multimodal({"atac": tmp_path / "g.tsv"})
    with pytest.raises(InvalidDataError, match="3000 fragments, none of a barcode asked for"):
        atlas.add_multimodal({"atac": FragmentsInput(path, ["none"])})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InvalidDataError, match="cannot read the fragments after number 0"):
        atlas.add_multimodal({"atac": path})
    x = np.ones((2, 2), np.float32)
    anndata.AnnData(x).write_h5ad(tmp_path / "peaks.h5ad")
    # A matrix of peaks is no error: it has a space of its own.
    atlas.add_multimodal({"atac": tmp_path / "peaks.h5ad"})
    assert [row["feature_space"] for row in atlas.catalog.dataset_rows()] == ["chromatin_peaks"]
