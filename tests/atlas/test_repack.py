"""Rewriting an atlas in another codec: same numbers, fewer bytes, everything else as it was."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from hbx_gpu import _files, cli
from hbx_gpu._storage import ChunkDirectory, read_layout
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._upkeep import repack as repacking
from hbx_gpu.atlas._upkeep.summary import summarize_groups
from hbx_gpu.atlas._writing import arrays
from hbx_gpu.atlas._writing.arrays import codec_names
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, AtlasLockedError, CorruptChunkError

ROWPACK, HOMEOBOX = "hbx_gpu.rowpack", "homeobox.bitpacking"
KINDS = ["mmap", "preadv"]
# Fixtures with sparse groups: one or more of every generation.
ATLASES = ["all_spaces", "cite_multimodal", "legacy_0_2_3", "missing_shards", "ragged_rna", "seed_2026_05"]


def make(n: int, seed: int = 0, genes: str = "abcdefgh", **obs: Any) -> anndata.AnnData:
    x = sp.random(n, len(genes), 0.5, "csr", random_state=np.random.default_rng(seed))
    x.data = np.ceil(x.data * 9)
    frame = pd.DataFrame(obs, index=[f"s{seed}c{i}" for i in range(n)])
    return anndata.AnnData(x.astype(np.float32), obs=frame, var=pd.DataFrame(index=list(genes)))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets in the codec of Homeobox, several shards each; a snapshot after each."""
    root = tmp_path_factory.mktemp("template") / "a"
    made = create_or_open_atlas(root, codec=HOMEOBOX)
    for seed, n in enumerate((60, 40)):
        made.add_from_anndata(make(n, seed), chunk_shape=32, shard_shape=64)
        made.optimize()
        made.snapshot()
    return root


@pytest.fixture
def atlas(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "a")


def dataset_of(root: Path, version: int | None = None, reader: str = "mmap") -> CellDataset:
    made: Any = RaggedAtlas.checkout(root, version).query().to_cell_dataset("gene_expression")
    return CellDataset(
        made._sources,
        made._rows,
        layer=made.layer,
        n_features=made.n_features,
        feature_uids=made.feature_uids,
        reader=reader,
    )


def whole(dataset: CellDataset) -> list[list[Any]]:
    batch = dataset[np.arange(len(dataset))]
    return [batch.indices.tolist(), batch.values.tolist(), batch.offsets.tolist()]


def whole_array(path: Path) -> list[Any]:
    result: list[Any] = np.asarray(zarr.open_array(path, mode="r")[:]).tolist()
    return result


def contents(root: Path) -> dict[str, list[Any]]:
    """Every array of the store, by zarr itself."""
    store = root / "zarr_store"
    paths = sorted({p.parent for name in ("zarr.json", ".zarray") for p in store.rglob(name)})
    nodes: dict[str, Any] = {str(p.relative_to(store)): zarr.open(p, mode="r") for p in paths}
    arrays = {name: node for name, node in nodes.items() if hasattr(node, "dtype")}
    return {name: node[...].tolist() for name, node in arrays.items()}


def files(root: Path) -> dict[str, bytes]:
    store = root / "zarr_store"
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def chains(root: Path) -> dict[str, list[str]]:
    """Array -> names of its inner codecs, for index and layers of sparse groups."""
    out = {}
    for path in sorted((root / "zarr_store").rglob("zarr.json")):
        name = str(path.parent.relative_to(root / "zarr_store"))
        metadata = json.loads(path.read_text())
        if metadata["node_type"] == "array" and ("/csr/" in name or "/cell_sorted/" in name):
            setting = metadata["codecs"][0].get("configuration", {})
            out[name] = [codec["name"] for codec in setting.get("codecs", metadata["codecs"])]
    return out


def payload(root: Path, group: str) -> int:
    """Bytes of the encoded chunks of index and counts."""
    total = 0
    for array in ("csr/indices", "csr/layers/counts"):
        directory = ChunkDirectory([read_layout(root / "zarr_store" / group / array)])
        total += int(directory.extents(np.arange(directory.base[-1])).nbytes.sum())
    return total


def nothing_left_over(root: Path) -> bool:
    return not list((root / ".hbx_gpu").glob("*.json")) and not (root / "zarr_store" / ".staging").exists()


def test_real_files_there_and_back(
    tmp_path: Path, real_h5ad: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "a"
    args = ["--atlas", str(root), "--codec", HOMEOBOX]
    assert cli.main(["ingest", *map(str, real_h5ad), *args]) == 0
    before, stored = files(root), contents(root)
    expected = [whole(dataset_of(root, reader=kind)) for kind in KINDS]
    capsys.readouterr()

    ticks: list[tuple[int, int]] = []
    report = repack(root, ROWPACK, progress=lambda *at: ticks.append(at))
    assert [group.outcome for group in report.groups] == ["repacked"] * 2
    assert ticks[-1] == (4 * (691_914 + 23_866),) * 2
    assert all(a[0] < b[0] for a, b in itertools.pairwise(ticks))
    assert contents(root) == stored
    assert [whole(dataset_of(root, reader=kind)) for kind in KINDS] == expected
    groups = {group.n_values: group for group in summarize_groups(Snapshot.open(root))}
    mouse = next(group for group in report.groups if group.n_values == 691_914)
    assert 8 * payload(root, mouse.zarr_group) / 691_914 <= 10.5
    assert groups[691_914].codecs == [ROWPACK]
    assert groups[691_914].bits_per_value == pytest.approx(8 * mouse.bytes_after / 691_914)
    assert mouse.bytes_after < 0.3 * mouse.bytes_before
    assert json.loads((root / "hbx_gpu.json").read_text())["codec"] == ROWPACK

    assert cli.main(["repack", str(root), "--codec", HOMEOBOX]) == 0
    assert "2 of 2 groups repacked as homeobox.bitpacking" in capsys.readouterr().out
    assert files(root) == before
    assert nothing_left_over(root)


@pytest.mark.parametrize("name", ATLASES)
def test_atlases_of_homeobox(homeobox_fixtures: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "atlas"
    shutil.copytree(homeobox_fixtures / name / "atlas", root)
    before, stored, codecs = files(root), contents(root), chains(root)
    report = repack(root, ROWPACK)
    for group in report.groups:
        sparse = group.feature_space in ("gene_expression", "chromatin_accessibility")
        assert group.outcome == ("repacked" if sparse else "left alone")
        assert sparse or group.reason in ("dense", "discrete spatial")
    assert contents(root) == stored
    floats = {
        array for array, codec in codecs.items() if codec == ["bytes", "zstd"] and "chromo" not in array
    }
    assert chains(root) == {a: ["bytes", *(["zstd", "crc32c"] if a in floats else [ROWPACK])] for a in codecs}
    assert {group.outcome for group in repack(root, ROWPACK).groups} <= {"unchanged", "left alone"}

    repack(root, HOMEOBOX)
    after = files(root)
    # As it was, but for the checksum that we add.
    assert chains(root) == {array: [*codec, "crc32c"] for array, codec in codecs.items()}
    assert set(after) == set(before)
    for path in before:
        assert after[path] == before[path] or path.startswith(tuple(codecs)), path
    assert not (root / "hbx_gpu.json").exists()
    assert nothing_left_over(root)


def test_every_codec_to_the_next(atlas: Path) -> None:
    stored, expected = contents(atlas), whole(dataset_of(atlas))
    for name in [*codec_names(), ROWPACK]:
        repack(atlas, name)
        assert contents(atlas) == stored, name
        assert whole(dataset_of(atlas)) == expected, name
        with pytest.raises(AlreadyIngestedError, match="nothing was added"):
            RaggedAtlas.open(atlas).add_from_anndata(make(60), codec=name)


def test_what_is_not_rewritten_is_kept(atlas: Path) -> None:
    """Other arrays and files are linked, attributes and modes stay; float layers keep their codec."""
    row = RaggedAtlas.open(atlas).catalog.dataset_rows()[0]
    group = atlas / "zarr_store" / row["zarr_group"]
    n = zarr.open_array(group / "csr/indices", mode="r").shape[0]
    # With a checksum: without one the layer would be written again.
    checked = [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]
    floats: Any = {"dtype": "float32", "chunks": (32,), "shards": (64,), "compressors": checked}
    zarr.create_array(group / "csr/layers/tpm", shape=(n,), **floats)[:] = np.arange(n)
    zarr.create_array(group / "csc/indptr", shape=(9,), dtype="int64")[:] = 7
    (group / "notes.txt").write_text("mine")
    (group / "link").symlink_to("notes.txt")
    (group / "linked").symlink_to("csc")
    counts = zarr.open_array(group / "csr/layers/counts", mode="a")
    counts.attrs["unit"] = "UMI"
    group.chmod(0o750)
    (group / "csr/indices/zarr.json").chmod(0o600)
    kept = ["csr/layers/tpm/c/0", "csc/indptr/zarr.json", "notes.txt", "zarr.json"]
    inodes = {name: (group / name).stat().st_ino for name in kept}

    repack(atlas, ROWPACK)
    assert {name: (group / name).stat().st_ino for name in kept} == inodes
    assert os.readlink(group / "link") == "notes.txt"
    assert os.readlink(group / "linked") == "csc"
    assert zarr.open_array(group / "csr/layers/counts", mode="r").attrs["unit"] == "UMI"
    assert group.stat().st_mode & 0o777 == 0o750
    assert (group / "csr/indices/c/0").stat().st_mode & 0o777 == 0o600
    repack(atlas, "gzip")  # which float layers take as well
    assert (group / "csr/layers/tpm/c/0").stat().st_ino != inodes["csr/layers/tpm/c/0"]
    assert whole_array(group / "csr/layers/tpm") == list(range(n))


def test_files_are_copied_where_they_cannot_be_linked(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    stored = contents(atlas)
    monkeypatch.setattr(os, "link", no_links)
    repack(atlas, ROWPACK)
    assert contents(atlas) == stored


def test_unsharded_arrays_and_absent_chunks_stay_what_they_are(atlas: Path) -> None:
    row = RaggedAtlas.open(atlas).catalog.dataset_rows()[0]
    group = atlas / "zarr_store" / row["zarr_group"]
    values: Any = zarr.open_array(group / "csr/layers/counts", mode="r")[:]
    values[32:64] = 0  # a chunk inside a shard
    values[64:128] = 0  # a whole shard
    shutil.rmtree(group / "csr/layers/counts")
    zarr.create_array(
        group / "csr/layers/counts", shape=values.shape, dtype="uint32", chunks=(32,), shards=(64,)
    )[:] = values
    indices: Any = zarr.open_array(group / "csr/indices", mode="r")[:]
    shutil.rmtree(group / "csr/indices")
    zarr.create_array(group / "csr/indices", shape=indices.shape, dtype="uint32", chunks=(32,))[:] = indices

    repack(atlas, ROWPACK)
    assert whole_array(group / "csr/indices") == indices.tolist()
    assert whole_array(group / "csr/layers/counts") == values.tolist()
    layout = read_layout(group / "csr/indices")
    assert (layout.sharded, layout.chunk_shape) == (False, (32,))
    directory = ChunkDirectory([read_layout(group / "csr/layers/counts")])
    found = directory.extents(np.arange(directory.base[-1])).nbytes
    assert (found < 0).tolist() == [i in (1, 2, 3) for i in range(len(found))]
    assert not (group / "csr/layers/counts/c/1").exists()


def test_a_second_run_has_nothing_to_do_and_goes_on_where_the_first_ended(
    atlas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = contents(atlas)
    real, left = arrays.ObjectWriter.put, [0]

    def put(self: arrays.ObjectWriter, encoded: bytes | None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, encoded)

    with monkeypatch.context() as patch:
        first = min(row["zarr_group"] for row in RaggedAtlas.open(atlas).catalog.dataset_rows())
        left[0] = 2 * -(-len(stored[f"{first}/csr/indices"]) // 32) + 3
        patch.setattr(arrays.ObjectWriter, "put", put)
        with pytest.raises(OSError, match="No space left"):
            repack(atlas, ROWPACK)
    assert contents(atlas) == stored
    assert nothing_left_over(atlas)
    codecs = {group.codecs[0] for group in summarize_groups(Snapshot.open(atlas))}
    assert codecs == {ROWPACK, HOMEOBOX}
    assert json.loads((atlas / "hbx_gpu.json").read_text())["codec"] == HOMEOBOX
    assert sorted(group.outcome for group in repack(atlas, ROWPACK).groups) == ["repacked", "unchanged"]
    report = repack(atlas, ROWPACK)
    assert [group.outcome for group in report.groups] == ["unchanged"] * 2
    assert report.bytes_before == report.bytes_after
    assert contents(atlas) == stored


def test_ingesting_goes_on(atlas: Path) -> None:
    """Data that were ingested before are known, new data come in the new codec, snapshots agree."""
    repack(atlas, ROWPACK)
    opened = RaggedAtlas.open(atlas)
    assert opened.add_from_anndata(make(60), exist_ok=True) == 0
    with pytest.raises(
        AlreadyIngestedError, match=r"codec was 'hbx_gpu\.rowpack', is 'zstd' \(hbx-gpu repack"
    ):
        opened.add_from_anndata(make(60), codec="zstd", exist_ok=True)
    assert opened.add_from_anndata(make(50, 7)) == 50
    assert repack(atlas, HOMEOBOX).groups[0].outcome == "repacked"  # cells of no snapshot as well
    opened.optimize()
    assert opened.snapshot() == 2
    assert set(map(tuple, chains(atlas).values())) == {("bytes", HOMEOBOX, "crc32c")}
    assert len(dataset_of(atlas)) == 150


def test_an_atlas_of_homeobox_goes_on_in_its_codec(homeobox_fixtures: Path, tmp_path: Path) -> None:
    root = tmp_path / "atlas"
    shutil.copytree(homeobox_fixtures / "ragged_rna" / "atlas", root)
    opened = RaggedAtlas.open(root)
    assert opened.catalog.names.codec == HOMEOBOX


def test_a_dataset_that_lacks_the_codec_is_refused_not_misread(atlas: Path) -> None:
    """Raw numbers have no checksum: only what files they are tells that they are others now."""
    repack(atlas, "none")
    for kind in KINDS:
        expected = whole(dataset_of(atlas, reader=kind))
        opened, looked_up, fresh = (dataset_of(atlas, reader=kind) for _ in range(3))
        whole(opened)
        looked_up._directory.extents(np.arange(looked_up._directory.base[-1]))
        repack(atlas, "zstd")
        assert whole(opened) == expected
        for stale in (looked_up, fresh):
            with pytest.raises(CorruptChunkError, match=r"replaced by another one .* open the dataset again"):
                whole(stale)
        assert whole(dataset_of(atlas, reader=kind)) == expected
        repack(atlas, "none")


def test_a_wrong_encoding_is_noticed(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(atlas)
    real = arrays.ChunkEncoder.encode

    def wrong(self: arrays.ChunkEncoder, values: np.ndarray) -> Iterable[bytes]:
        changed = values.copy()
        changed[40] += 1
        return real(self, changed)

    monkeypatch.setattr(arrays.ChunkEncoder, "encode", wrong)
    with pytest.raises(CorruptChunkError, match=r"chunk 1\): rewritten, it decodes to other values"):
        repack(atlas, ROWPACK)
    assert files(atlas) == before
    assert nothing_left_over(atlas)


def test_a_damaged_chunk_is_named_and_kept(atlas: Path) -> None:
    repack(atlas, ROWPACK)
    shard = next((atlas / "zarr_store").rglob("csr/layers/counts/c/0"))
    data = bytearray(shard.read_bytes())
    data[45] ^= 255
    shard.write_bytes(data)
    with pytest.raises(CorruptChunkError, match=r"csr/layers/counts', chunk 0, file .*CRC32C"):
        repack(atlas, "zstd")
    assert shard.read_bytes() == data
    assert nothing_left_over(atlas)


def test_without_an_exchange_of_names(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = contents(atlas)
    monkeypatch.setattr(_files, "exchange", lambda *_: False)
    repack(atlas, ROWPACK)
    assert contents(atlas) == stored
    assert nothing_left_over(atlas)

    real, calls = os.rename, []

    def second_fails(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        repack(atlas, "zstd")
    assert contents(atlas) == stored
    assert nothing_left_over(atlas)


def test_refusals(atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown codec 'lzma'; choose one of"):
        repack(atlas, "lzma")
    with pytest.raises(FileNotFoundError, match="No atlas found"):
        repack(tmp_path / "nothing", ROWPACK)
    with RaggedAtlas.open(atlas).session.writing(), pytest.raises(AtlasLockedError):
        repack(atlas, ROWPACK)
    before = files(atlas)
    real = os.access
    for folder in (atlas, atlas / "zarr_store", next((atlas / "zarr_store").glob("*/gene_expression"))):
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, mode, bad=folder: path != bad and real(path, mode))
            with pytest.raises(AtlasError, match=f"cannot repack: {folder} is read-only"):
                repack(atlas, ROWPACK)
    assert files(atlas) == before


def test_command_line(
    atlas: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["repack", str(atlas), "--codec", ROWPACK]) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 groups repacked as hbx_gpu.rowpack" in out
    assert "100%" in err
    assert cli.main(["info", str(atlas)]) == 0
    assert ROWPACK in capsys.readouterr().out
    assert cli.main(["repack", str(atlas), "--codec", "lzma"]) == 1
    assert "error: unknown codec 'lzma'" in capsys.readouterr().err

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repacking, "_compare", stop)
    assert cli.main(["repack", str(atlas), "--codec", "zstd"]) == 130
    assert "every group is whole; run the command again" in capsys.readouterr().err
    assert nothing_left_over(atlas)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_groups_are_rewritten_by_an_executor(tmp_path: Path, n_threads: int) -> None:
    """As in this process: reports in order, every value as before, progress to the end, nothing left over."""
    atlas = create_or_open_atlas(tmp_path / "a")
    for seed in range(4):
        x = sp.random(30, 8, 0.4, "csr", random_state=np.random.default_rng(seed))
        x.data = np.ceil(x.data * 9)
        names = [f"s{seed}c{i}" for i in range(30)]
        frame = pd.DataFrame(index=names)
        adata = anndata.AnnData(x.astype(np.float32), obs=frame, var=pd.DataFrame(index=list("abcdefgh")))
        atlas.add_from_anndata(adata)
    atlas.optimize()
    atlas.snapshot()
    before = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata().X.toarray()
    calls: list[tuple[int, int]] = []
    with ThreadPoolExecutor(n_threads) as executor:
        report = repack(tmp_path / "a", "zstd", executor=executor, progress=lambda *call: calls.append(call))
    assert [group.outcome for group in report.groups] == ["repacked"] * 4
    assert [group.zarr_group for group in report.groups] == sorted(g.zarr_group for g in report.groups)
    assert calls[-1][0] == calls[-1][1] > 0
    np.testing.assert_array_equal(
        RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata().X.toarray(), before
    )
    assert not (tmp_path / "a" / "zarr_store" / ".staging").exists()
    assert not list((tmp_path / "a" / ".hbx_gpu").glob("*.json"))
    assert {group.outcome for group in repack(tmp_path / "a", "zstd").groups} == {"unchanged"}
