"""The write lock: of the file system where that holds on all machines, else a lease in a Lance table."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import hbx_gpu
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._catalog import lease, lock
from hbx_gpu.atlas._catalog.file_systems import holds, locks_hold
from hbx_gpu.errors import AtlasLockedError
from tests.atlas.test_ingest_crash import make

_ROOT = "22 1 8:1 / / rw,relatime - ext4 /dev/sda rw"


@pytest.mark.parametrize(
    ("mount", "safe"),
    [
        ("30 22 0:1 / /data rw - xfs /dev/sdb rw", True),
        ("30 22 0:1 / /data rw - nfs4 server:/x rw,vers=4.2", False),
        ("30 22 0:1 / /data rw - lustre server:/x rw,flock,lazystatfs", True),
        ("30 22 0:1 / /data rw - lustre server:/x rw,localflock", False),
        ("30 22 0:1 / /data rw - fuse.sshfs server:/x rw", False),
        ("30 22 0:1 / /data\\040two rw - nfs server:/x rw", True),  # another folder
        ("30 22 0:1 / /database rw - nfs server:/x rw", True),
        ("a line of another kind", True),
        ("30 22 0:1 / /data rw - nfs server:/x rw\n31 30 0:2 / /data/atlas rw - tmpfs tmpfs rw", True),
    ],
)
def test_file_systems(mount: str, safe: bool) -> None:
    assert holds(f"{_ROOT}\n{mount}", "/data/atlas/.hbx_gpu") is safe


def test_this_machine(tmp_path: Path) -> None:
    assert isinstance(locks_hold(tmp_path), bool)
    assert holds("30 22 0:1 / /with\\040space rw - nfs server:/x rw", "/with space/a") is False


@pytest.fixture
def leased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An atlas on a file system whose locks do not hold."""
    monkeypatch.setattr(lock, "locks_hold", lambda _: False)
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(5, list("ab"), 0))
    return tmp_path / "a"


def test_everything_works_with_a_lease(leased: Path, tmp_path: Path) -> None:
    make(6, list("bc"), 1).write_h5ad(tmp_path / "1.h5ad")
    assert hbx_gpu.ingest_many(leased, [tmp_path / "1.h5ad"]).n_added == 1
    atlas = RaggedAtlas.open(leased)
    atlas.optimize()
    atlas.snapshot()
    repack(leased, "zstd")
    assert RaggedAtlas.checkout_latest(leased).query().count() == 11
    assert not (leased / ".hbx_gpu" / "lock").exists()
    assert "lease" not in " ".join(path.name for path in (leased / "lance_db").iterdir())


def test_one_of_several_gets_the_lease(leased: Path) -> None:
    won: list[int] = []
    refused: list[str] = []
    begin, end = threading.Barrier(4), threading.Barrier(4)

    def write(i: int) -> None:
        begin.wait()
        try:
            with lock.WriteLock(leased).hold():
                won.append(i)
                end.wait()
        except AtlasLockedError as error:
            refused.append(str(error))
            end.wait()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 3
    assert all(f"process {os.getpid()} on " in text for text in refused)
    with lock.WriteLock(leased).hold():
        pass  # given back


def test_the_lease_of_a_dead_writer_runs_out(leased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    monkeypatch.setattr(lease.Lease, "_keep", lambda _: None)  # it died
    dead = lease.Lease(leased, leased / ".hbx_gpu")
    with pytest.raises(AtlasLockedError, match=r"its lease ends in \d+ s"), lock.WriteLock(leased).hold():
        pass
    time.sleep(0.6)
    with pytest.raises(AtlasLockedError, match="another writer holds"), lock.WriteLock(leased).hold():
        pass  # the clocks of machines differ
    monkeypatch.setattr(lease, "_SKEW", 0.0)
    with lock.WriteLock(leased).hold(), pytest.raises(AtlasLockedError, match="lost the write lock"):
        dead.check()


def test_a_lease_is_prolonged(leased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 3.0)
    held = lease.Lease(leased, leased / ".hbx_gpu")
    first = held._until
    while held._until == first:
        time.sleep(0.05)
    held.check()
    assert held._row().until >= held._until > first
    held.release()


def test_a_lease_that_somebody_else_took_is_lost(leased: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    held = lease.Lease(leased, leased / ".hbx_gpu")
    held._put("true", token="somebody else", until=time.time() + 60)
    held._keeper.join(60)
    with pytest.raises(AtlasLockedError, match="has it"):
        held.check()


def test_nothing_is_added_after_the_lease_is_lost(
    leased: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(6, list("bc"), 1).write_h5ad(tmp_path / "1.h5ad")
    atlas = RaggedAtlas.open(leased)

    with monkeypatch.context() as patch:
        patch.setattr(lease.Lease, "_keep", lambda _: None)
        real = time.time
        patch.setattr(time, "time", lambda: real() + (1e6 if atlas.session.lock._depth else 0))
        with pytest.raises(AtlasLockedError, match="could not be prolonged in time"):
            atlas.add_from_h5ad(tmp_path / "1.h5ad")
        with pytest.raises(AtlasLockedError, match="could not be prolonged in time"):
            hbx_gpu.ingest_many(atlas, [tmp_path / "1.h5ad"])
    assert atlas.catalog.obs("cells").count_rows() == 5
    assert len(atlas.catalog.dataset_rows()) == 1


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A process forked while the lock is held, as pools do, lives on when its parent is killed."""
    read, write = os.pipe()
    begun, begins = os.pipe()
    with lock.WriteLock(tmp_path).hold():
        child = os.fork()
        if not child:
            os.close(write)
            os.write(begins, b"x")
            os.read(read, 1)
            os._exit(0)
    os.read(begun, 1)
    with lock.WriteLock(tmp_path).hold():
        pass
    for end in (write, read, begun, begins):
        os.close(end)
    os.waitpid(child, 0)
