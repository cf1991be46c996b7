"""Atlases are written to object storage: equal to local ones, one writer at a time, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._remote import commits, lease, writing
from hbx_gpu._remote.commits import clean
from hbx_gpu._remote.places import Place, parse
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, ingest_many, repack
from hbx_gpu.errors import AlreadyIngestedError, AtlasLockedError, HbxError, RemoteError, UnsupportedError
from tests import fresh
from tests.emulation.build import outer_environment
from tests.remote.objects import content, listing
from tests.remote.range_server import Kind, RangeServer, at_random
from tests.remote.weed import Bucket

Make = Callable[..., RangeServer]
IsTime = Callable[[str, str], bool]


@pytest.fixture
def server(range_server: Make) -> RangeServer:
    made = range_server()
    (made.root / "bucket").mkdir()
    return made


@pytest.fixture
def url(server: RangeServer) -> str:
    parse("s3://bucket", server.s3_options)
    return "s3://bucket/atlas"


def matrix(path: object, options: dict[str, str] | None = None) -> np.ndarray:
    """The dense counts of the newest snapshot."""
    atlas = RaggedAtlas.checkout_latest(str(path), storage_options=options)
    dataset = atlas.query().to_cell_dataset()
    assert isinstance(dataset, CellDataset)
    batch = dataset.__getitems__(np.arange(len(dataset)))
    out = np.zeros((len(dataset), dataset.n_features))
    for row in range(len(dataset)):
        first, last = batch.offsets[row : row + 2]
        out[row, batch.indices[first:last]] = batch.values[first:last]
    return out


def h5ad(path: Path, seed: int = 0, n: int = 30) -> Path:
    """A small file of counts."""
    import anndata
    import pandas as pd
    from scipy import sparse

    random = np.random.default_rng(seed)
    counts = random.poisson(0.5, (n, 20)).astype(np.float32)
    var = pd.DataFrame(index=[f"ENSG{i:011}" for i in range(20)])
    obs = pd.DataFrame(index=[f"s{seed}c{i}" for i in range(n)])
    anndata.AnnData(sparse.csr_matrix(counts), obs, var).write_h5ad(path)
    return path


def fill(path: object, *files: Path, options: dict[str, str] | None = None) -> None:
    atlas = create_or_open_atlas(str(path), storage_options=options)
    for file in files:
        atlas.add_from_h5ad(file)
    atlas.optimize()
    atlas.snapshot()


def test_an_atlas_on_a_real_server_equals_a_local_one(bucket: Bucket, tmp_path: Path) -> None:
    files = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    fill(tmp_path / "local", *files)
    fill(f"{bucket.url}/some/atlas", *files, options=bucket.options)
    assert np.array_equal(matrix(tmp_path / "local"), matrix(f"{bucket.url}/some/atlas", bucket.options))
    left = [path for path in listing(bucket.url, bucket.options) if "/.hbx_gpu/" in path]
    assert left == ["some/atlas/.hbx_gpu/lease.json"]


def test_many_files_go_to_an_address_with_options(bucket: Bucket, tmp_path: Path) -> None:
    files = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    url, options = f"{bucket.url}/many", bucket.options
    report = ingest_many(url, files, storage_options=options)
    assert report.n_added == 2
    atlas = RaggedAtlas.open(url, storage_options=options)
    assert len(RaggedAtlas.list_versions(url, storage_options=options)) == 1
    assert len(RaggedAtlas.checkout(url, storage_options=options).query().to_pandas()) == 60
    with pytest.raises(TypeError, match="an open atlas has its own"):
        ingest_many(atlas, files, storage_options=options)


def test_every_kind_of_write_reaches_the_store(url: str, tmp_path: Path) -> None:
    file, other = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    fill(url, file)
    before = matrix(url)
    with pytest.raises(AlreadyIngestedError):
        create_or_open_atlas(url).add_from_h5ad(file)
    atlas = RaggedAtlas.open(url)
    assert atlas.url == url
    assert url in repr(atlas)
    fill(url, other)
    assert len(matrix(url)) == 60
    report = repack(url, "zstd")
    assert {group.outcome for group in report.groups} == {"repacked"}
    assert len(matrix(url)) == 60
    assert "zstd" in "".join(
        content("s3://bucket", _options(url), path).decode()
        for path in listing("s3://bucket", _options(url))
        if path.endswith("indices/zarr.json")
    )
    # The object that was opened first goes on, with what others have done meanwhile.
    atlas.remove_dataset("b.h5ad")
    atlas.optimize()
    atlas.snapshot()
    assert np.array_equal(matrix(url), before)
    with pytest.raises(FileExistsError, match="s3://bucket/atlas"):
        RaggedAtlas.create(url)


def _options(url: str) -> dict[str, str]:
    from hbx_gpu._remote.options import options_of

    return options_of(url)


def test_what_is_not_there_or_cannot_be_written_is_said(url: str, server: RangeServer) -> None:
    with pytest.raises(FileNotFoundError, match="s3://bucket/none"):
        RaggedAtlas.open("s3://bucket/none")
    with pytest.raises(UnsupportedError, match="takes no files"):
        create_or_open_atlas(f"{server.url}/bucket/atlas", storage_options={"allow_http": "true"})
    with pytest.raises(HbxError, match="leave store= out"):
        create_or_open_atlas(url, store="/elsewhere")


def test_a_file_whose_cells_are_there_under_another_name_is_found(url: str, tmp_path: Path) -> None:
    import anndata

    file = h5ad(tmp_path / "a.h5ad", 1)
    fill(url, file)
    again = anndata.read_h5ad(file)
    again.obs["more"] = 1
    again.write_h5ad(tmp_path / "again.h5ad")
    with pytest.raises(AlreadyIngestedError, match="30 of its 30 cells"):
        create_or_open_atlas(url).add_from_h5ad(tmp_path / "again.h5ad")
    assert len(matrix(url)) == 30


# One writer at a time


def test_a_second_writer_is_refused_until_the_first_has_finished(url: str, tmp_path: Path) -> None:
    fill(url, h5ad(tmp_path / "a.h5ad", 1))
    first, second = RaggedAtlas.open(url), RaggedAtlas.open(url)
    with first.session.writing(), pytest.raises(AtlasLockedError, match="another writer holds"):
        second.optimize()
    second.optimize()


def test_of_two_who_ask_at_once_one_gets_the_lease(url: str) -> None:
    leases = [lease.Lease(parse_place(url)) for _ in range(4)]
    got: list[lease.Lease] = []

    def ask(one: lease.Lease) -> None:
        try:
            one.acquire()
        except AtlasLockedError:
            return
        got.append(one)

    threads = [threading.Thread(target=ask, args=(one,)) for one in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def parse_place(url: str) -> Place:
    place = parse(url)
    assert isinstance(place, Place)
    return place


def test_a_lease_of_another_machine_ends_when_it_is_not_renewed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = lease.Lease(parse_place(url))
    monkeypatch.setattr(lease, "_namespace", lambda: "another machine")
    monkeypatch.setattr(lease, "SECONDS", 3.0)
    monkeypatch.setattr(lease.Lease, "_renew_often", lambda _: None)
    dead.acquire()
    monkeypatch.setattr(lease, "_namespace", lambda: "this machine")
    with pytest.raises(AtlasLockedError, match="its lease ends in"):
        lease.Lease(parse_place(url)).acquire()
    monkeypatch.setattr(lease, "_SLACK", -4.0)
    living = lease.Lease(parse_place(url))
    living.acquire()
    monkeypatch.setattr(lease, "_SLACK", 2.0)
    with pytest.raises(AtlasLockedError):
        dead.renew()
    living.release()


def test_a_lease_that_is_not_renewed_in_time_is_lost(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.Lease, "_renew_often", lambda _: None)
    held = lease.Lease(parse_place(url))
    held.acquire()
    held.check()
    held._until = time.monotonic() + 1  # less than times in whole seconds can tell
    with pytest.raises(AtlasLockedError, match="could not be renewed in time"):
        held.check()
    held.renew()
    held.release()


def test_a_lease_ends_with_its_process_though_another_has_its_number(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_started", lambda _: "1000")
    dead = lease.Lease(parse_place(url))
    dead.acquire()
    with pytest.raises(AtlasLockedError, match="another writer holds"):
        lease.Lease(parse_place(url)).acquire()
    monkeypatch.setattr(lease, "_started", lambda _: "2000")
    living = lease.Lease(parse_place(url))
    living.acquire()
    dead.release()  # changes nothing
    living.renew()
    living.release()


def test_a_writer_whose_lease_has_passed_on_makes_nothing_visible(url: str, tmp_path: Path) -> None:
    fill(url, h5ad(tmp_path / "a.h5ad", 1))
    atlas = RaggedAtlas.open(url)
    before = matrix(url)

    def write() -> None:
        with atlas.session.writing():
            place = parse_place(url) / ".hbx_gpu" / "lease.json"
            writing.put(place, json.dumps({"free": True, "token": "thief"}).encode())
            fill_again(atlas, h5ad(tmp_path / "b.h5ad", 2))

    with pytest.raises(AtlasLockedError):
        write()
    assert np.array_equal(matrix(url), before)


# Faults


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_now_and_then_is_written_to(
    server: RangeServer, url: str, tmp_path: Path, seed: int
) -> None:
    kinds: tuple[Kind, ...] = ("503", "reset", "429", "500")
    server.faults = at_random(0.08, kinds, seed=seed, methods="GET PUT HEAD POST DELETE")
    fill(url, h5ad(tmp_path / "a.h5ad", 1))
    server.faults = None
    assert any(request.fault for request in server.log)
    assert len(matrix(url)) == 30
    assert clean(parse_place(url)) == []


def test_a_store_that_stays_away_is_an_error_that_names_it(
    server: RangeServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_ATTEMPTS", 1)
    fill(url, h5ad(tmp_path / "a.h5ad", 1))
    before = matrix(url)
    atlas = RaggedAtlas.open(url)
    server.faults = lambda method, path: "reset" if method == "PUT" and "zarr_store" in path else None
    with pytest.raises(RemoteError, match="s3://bucket/atlas/zarr_store"):
        atlas.add_from_h5ad(h5ad(tmp_path / "b.h5ad", 2))
    server.faults = None
    assert np.array_equal(matrix(url), before)
    fill(url, tmp_path / "b.h5ad")
    assert len(matrix(url)) == 60


# Deaths


_SCRIPT = """
import sys
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
atlas = create_or_open_atlas(sys.argv[1])
for file in sys.argv[2:]:
    atlas.add_from_h5ad(file, exist_ok=True)
atlas.optimize()
atlas.snapshot()
"""


def _killed_at(server: RangeServer, url: str, files: list[Path], is_time: Callable[[str, str], bool]) -> bool:
    """Run a writer that is killed when it makes a request; whether it was."""
    command = [sys.executable, "-c", _SCRIPT, url, *files]
    child = fresh.popen(command, env=outer_environment(), stderr=subprocess.DEVNULL)

    def choose(method: str, path: str) -> None:
        if is_time(method, path):
            child.kill()

    server.faults = choose
    killed = child.wait(120) != 0
    server.faults = None
    return killed


MOMENTS: dict[str, IsTime] = {
    "the first array": lambda method, path: method == "PUT" and "zarr_store" in path and "/c/" in path,
    "the commit": lambda method, path: method == "PUT" and "/commit-" in path,
    "a version of a table": lambda method, path: method == "PUT" and path.endswith(".manifest"),
    "the removal of what was copied": lambda method, path: (method, path) == ("POST", "/bucket"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_writer_that_is_cut_off_leaves_no_visible_half(
    server: RangeServer, url: str, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    fill(url, first)
    before = matrix(url)
    atlas = RaggedAtlas.open(url)
    gone = False

    def choose(method: str, path: str) -> Kind | None:
        nonlocal gone
        gone = gone or MOMENTS[moment](method, path)
        return "reset" if gone else None

    server.faults = choose
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_ATTEMPTS", 1)
        with pytest.raises(RemoteError):
            atlas.add_from_h5ad(second)
    server.faults = None
    assert np.array_equal(matrix(url), before)
    # As if the process had died: its lease is not given back.
    monkeypatch.setattr(lease, "_started", lambda pid: f"another start of {pid}")
    assert len(clean(parse_place(url))) == 1
    assert clean(parse_place(url)) == []
    assert np.array_equal(matrix(url), before)
    fill_again(RaggedAtlas.open(url), second)
    assert len(matrix(url)) == 60
    _assert_whole(url)


def test_a_killed_writer_leaves_no_visible_half(server: RangeServer, url: str, tmp_path: Path) -> None:
    first, second = h5ad(tmp_path / "a.h5ad", 1), h5ad(tmp_path / "b.h5ad", 2)
    fill(url, first)
    before = matrix(url)
    assert _killed_at(server, url, [second], MOMENTS["a version of a table"])
    assert np.array_equal(matrix(url), before)
    # The next writer finishes what was committed, and sees that the file is there.
    with pytest.raises(AlreadyIngestedError):
        RaggedAtlas.open(url).add_from_h5ad(second)
    _assert_whole(url)


def fill_again(atlas: RaggedAtlas, file: Path) -> None:
    atlas.add_from_h5ad(file, exist_ok=True)
    atlas.optimize()
    atlas.snapshot()


def _assert_whole(url: str) -> None:
    """Nothing lies in the store that no commit put there."""
    left = [path for path in listing(url, _options(url)) if path.startswith(".hbx_gpu/")]
    assert left == [".hbx_gpu/lease.json"]


@pytest.mark.long
@pytest.mark.slow
def test_writers_killed_at_random_moments_leave_no_visible_half(
    server: RangeServer, url: str, tmp_path: Path
) -> None:
    files = [h5ad(tmp_path / f"{i}.h5ad", i) for i in range(4)]
    fill(url, files[0])
    draws = np.random.default_rng(7)
    for _ in range(12):
        left = iter(range(int(draws.integers(5, 150)), -1, -1))
        _killed_at(server, url, files, lambda *_, left=left: next(left, 1) == 0)
        assert len(matrix(url)) in (30, 60, 90, 120)
    for file in files:
        fill_again(RaggedAtlas.open(url), file)
    assert len(matrix(url)) == 120
    _assert_whole(url)


def test_a_note_that_nobody_wrote_is_refused(url: str, tmp_path: Path) -> None:
    fill(url, h5ad(tmp_path / "a.h5ad", 1))
    place = parse_place(url)
    outside = [["remove", "../other", ""]]
    note = place / ".hbx_gpu" / "commit-x.json"
    writing.put(note, json.dumps({"format": 1, "steps": outside}).encode())
    with pytest.raises(HbxError, match="not a step"):
        commits.clean(place)
    writing.put(note, b"nothing")
    with pytest.raises(HbxError, match="not a note"):
        RaggedAtlas.open(url)
