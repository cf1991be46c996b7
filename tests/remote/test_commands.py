"""A user at the command line, with addresses in place of paths; and what interrupted writers leave."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hbx_gpu._remote import lease, writing
from hbx_gpu._remote.places import parse
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._catalog.journal import IngestNote
from hbx_gpu.cli import main
from hbx_gpu.errors import RemoteError
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.scdl._writing.convert import convert_h5ad
from tests.remote.objects import content, listing
from tests.remote.range_server import RangeServer
from tests.remote.test_writing import fill, h5ad, matrix
from tests.remote.weed import SECRET_KEY, Bucket

Make = Callable[..., RangeServer]


def flags(options: dict[str, str]) -> list[str]:
    return [word for key, value in options.items() for word in ("--storage-option", f"{key}={value}")]


def test_a_user_fills_looks_at_and_clears_an_atlas_in_a_bucket(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    atlas, options = f"{bucket.url}/atlas", flags(bucket.options)
    assert main(["ingest", str(first), str(second), "--atlas", atlas, *options]) == 0
    assert f"snapshot 0: 60 cells in {atlas}" in capsys.readouterr().out
    assert main(["info", atlas, *options]) == 0
    assert "60" in capsys.readouterr().out
    assert main(["repack", atlas, "--codec", "zstd", *options]) == 0
    assert main(["verify", atlas, "--clean", *options]) == 0
    shown = capsys.readouterr()
    assert "nothing was left" in shown.out + shown.err
    assert "2 whole, 0 damaged" in shown.out + shown.err
    assert main(["remove", atlas, "a.h5ad", *options]) == 0
    assert len(matrix(atlas, bucket.options)) == 30
    assert main(["ingest", str(tmp_path / "none.h5ad"), "--atlas", atlas, *options]) == 1
    shown = capsys.readouterr()
    assert SECRET_KEY not in shown.out + shown.err


def test_a_refused_first_file_leaves_no_atlas(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.h5ad").write_bytes(b"nothing")
    atlas = f"{bucket.url}/atlas"
    assert main(["ingest", str(tmp_path / "bad.h5ad"), "--atlas", atlas, *flags(bucket.options)]) == 1
    assert "bad.h5ad" in capsys.readouterr().err
    assert not [path for path in listing(bucket.url, bucket.options) if "lance_db" in path]


def _same_archive(url: str, options: dict[str, str], local: Path) -> None:
    files = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    there = {path for path in listing(url, options) if not path.startswith(".hbx_gpu/")}
    assert there == files
    for name in files - {"metadata.json"}:
        assert content(url, options, name) == (local / name).read_bytes(), name


def test_an_archive_is_made_in_a_bucket_and_replaced(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2, n=40)
    url, options = f"{bucket.url}/archive", flags(bucket.options)
    assert main(["convert", str(first), url, *options]) == 0
    convert_h5ad(first, tmp_path / "first", data_dtype="auto")
    _same_archive(url, bucket.options, tmp_path / "first")
    assert main(["convert", str(second), url, *options]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(second), url, "--overwrite", *options]) == 0
    convert_h5ad(second, tmp_path / "second", data_dtype="auto")
    _same_archive(url, bucket.options, tmp_path / "second")
    # An archive to an atlas in the bucket, and that back to an archive.
    assert main(["convert", str(tmp_path / "second"), f"{bucket.url}/atlas", *options]) == 0
    assert len(matrix(f"{bucket.url}/atlas", bucket.options)) == 40


def test_an_archive_whose_upload_is_cut_off_is_not_there(
    range_server: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = range_server()
    (server.root / "bucket").mkdir()
    place = parse("s3://bucket/archive", server.s3_options)
    monkeypatch.setattr(writing, "_ATTEMPTS", 1)
    file = h5ad(tmp_path / "a.h5ad", 1)
    server.faults = lambda method, path: "reset" if method == "PUT" and path.endswith("data.npy") else None
    with pytest.raises(RemoteError):
        convert_h5ad(file, str(place))
    server.faults = None
    assert "row_ptr.npy" not in listing(str(place), server.s3_options)
    monkeypatch.setattr(lease, "_started", lambda pid: f"another start of {pid}")
    from hbx_gpu._verify.leftovers import clean

    assert ["removed" in sentence for sentence in clean(place)] == [True]
    assert set(listing(str(place), server.s3_options)) == {".hbx_gpu/lease.json"}
    convert_h5ad(file, str(place))
    convert_h5ad(file, tmp_path / "local")
    _same_archive(str(place), server.s3_options, tmp_path / "local")


# On a local disk


def test_leftovers_of_a_local_atlas_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "atlas"
    fill(root, h5ad(tmp_path / "a.h5ad", 1))
    atlas = RaggedAtlas.open(root)
    atlas.catalog.journal.write(IngestNote("dead", "cells"))
    unfinished = [root / "zarr_store" / ".staging" / name for name in ("dead", "older")]
    for folder in unfinished:
        (folder / "group0").mkdir(parents=True)
    assert main(["verify", str(root), "--clean"]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("removed unfinished files") == 2
    assert not any(folder.exists() for folder in unfinished)
    assert main(["verify", str(root), "--clean"]) == 0
    shown = capsys.readouterr()
    assert "nothing was left" in shown.out + shown.err


def test_leftovers_of_a_local_archive_are_removed(tmp_path: Path) -> None:
    from hbx_gpu._verify.leftovers import clean
    from hbx_gpu.scdl._writing.new_folder import NewFolder, leftovers

    target = tmp_path / "archive"
    convert_h5ad(h5ad(tmp_path / "a.h5ad", 1), target)
    staging = NewFolder(target)
    shutil.copytree(staging.folder.parent, tmp_path / "kept")
    place = staging.folder.parent
    staging.discard()
    shutil.copytree(tmp_path / "kept", place)
    assert leftovers(target)
    assert len(clean(target)) == 1
    assert not leftovers(target)
    assert len(SingleCellMemMapDataset(str(target))) == 30
