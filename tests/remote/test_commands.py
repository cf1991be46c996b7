"""A user at the command line, with addresses in place of paths; and what interrupted writers leave."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hbx_gpu._commands import convert_h5ad_to_scdl
from hbx_gpu._remote import lease, writing
from hbx_gpu._remote.places import parse
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._catalog.journal import IngestNote
from hbx_gpu.cli import main
from hbx_gpu.errors import RemoteError, RemotePathError
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


# Sources and results at addresses


def test_sources_at_addresses_are_converted(
    range_server: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = range_server()
    (server.root / "b").mkdir()
    file = h5ad(server.root / "b" / "a.h5ad", 1)
    convert_h5ad(file, tmp_path / "local", data_dtype="auto")
    shutil.copytree(tmp_path / "local", server.root / "b" / "archive")
    fill(server.root / "b" / "atlas", file)
    options = flags(server.s3_options)
    plain = ["--storage-option", "allow_http=true"]
    for number, (source, given) in enumerate(
        [("s3://b/a.h5ad:X", options), ("s3://b/a.h5ad", options), (f"{server.url}/b/a.h5ad", plain)]
    ):
        target = tmp_path / f"of_file{number}"
        assert main(["convert", source, str(target), *given]) == 0
        shown = capsys.readouterr().out
        assert f"30 cells of {source}" in shown
        assert "hbx_gpu-copy-" not in shown
        assert (target / "data.npy").read_bytes() == (tmp_path / "local" / "data.npy").read_bytes()
    assert main(["convert", "s3://b/archive", str(tmp_path / "atlas"), *options]) == 0
    assert len(matrix(str(tmp_path / "atlas"), {})) == 30
    assert main(["convert", "s3://b/atlas", str(tmp_path / "of_atlas"), *options]) == 0
    assert len(SingleCellMemMapDataset(f"file://{tmp_path / 'of_atlas'}")) == 30
    capsys.readouterr()
    assert main(["convert", "s3://b/none", str(tmp_path / "x"), *options]) == 1
    assert "nothing at s3://b/none" in capsys.readouterr().err
    with pytest.raises(RemotePathError, match=r"hbx_gpu\.open\(url\)"):
        SingleCellMemMapDataset("s3://b/archive")


def test_statistics_of_addresses_are_those_of_the_paths(range_server: Make, tmp_path: Path) -> None:
    server = range_server()
    (server.root / "b").mkdir()
    file = h5ad(server.root / "b" / "a.h5ad", 1)
    fill(server.root / "b" / "atlas", file)
    options = flags(server.s3_options)
    for name in ("a.h5ad", "atlas"):
        here, there = tmp_path / f"here_{name}.csv", tmp_path / f"there_{name}.csv"
        assert main(["stats", f"s3://b/{name}", "--out", str(there), *options]) == 0
        assert main(["stats", str(server.root / "b" / name), "--out", str(here)]) == 0
        assert here.read_text() == there.read_text()


def test_an_atlas_in_a_bucket_keeps_its_statistics(
    range_server: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(place: object, content: bytes) -> None:
        del content
        raise RemoteError(f"{place}: the store refuses access")

    server = range_server()
    fill(server.root / "b" / "atlas", h5ad(tmp_path / "a.h5ad", 1))
    atlas = RaggedAtlas.checkout_latest("s3://b/atlas", storage_options=server.s3_options)
    # Where nothing may be written, the result is there all the same.
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("hbx_gpu.atlas._query.statistics.put", refused)
        first = atlas.statistics()
    assert "not kept" in caplog.text
    assert atlas.statistics().medians == first.medians
    (kept,) = (server.root / "b" / "atlas" / "statistics").iterdir()
    server.log.clear()
    assert atlas.statistics().medians == first.medians
    assert [request.path for request in server.requests()] == [f"/b/atlas/statistics/{kept.name}"]
    kept.write_bytes(b"damaged")
    assert atlas.statistics().medians == first.medians
    assert kept.stat().st_size > 100


def test_the_program_of_scdl_makes_an_archive_at_an_address(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = h5ad(tmp_path / "a.h5ad", 1)
    command = ["--data-path", str(file), "--save-path", bucket.url + "/archive", *flags(bucket.options)]
    assert convert_h5ad_to_scdl.main(command) == 0
    assert convert_h5ad_to_scdl.main(["--data-path", str(file), "--save-path", str(tmp_path / "local")]) == 0
    _same_archive(bucket.url + "/archive", bucket.options, tmp_path / "local")
    capsys.readouterr()
    assert convert_h5ad_to_scdl.main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
