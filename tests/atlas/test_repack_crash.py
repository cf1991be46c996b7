"""A repack that dies at any point: groups are whole, snapshots read the same, the next run ends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu import _files
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._catalog import journal, paths, swap
from hbx_gpu.atlas._catalog.names import set_default_codec
from hbx_gpu.atlas._upkeep import repack as repacking
from hbx_gpu.atlas._writing import arrays
from tests import fresh
from tests.atlas.dying import die_at, killed

ROWPACK, HOMEOBOX = "hbx_gpu.rowpack", "homeobox.bitpacking"


def _repack_and_die(atlas: Path, where: str, when: str, n: int, exchange: bool) -> None:
    if not exchange:
        _files.exchange = lambda *_: False  # of this process alone
    die_at(where, when, n)
    repack(atlas, ROWPACK)


_SLOW_REPACK = """
import sys, time
from hbx_gpu.atlas import repack
from hbx_gpu.atlas._writing import arrays
real = arrays.ObjectWriter.put

def put(self, encoded):
    time.sleep(0.01)
    real(self, encoded)

arrays.ObjectWriter.put = put
print(flush=True)
repack(sys.argv[1], "hbx_gpu.rowpack")
"""

# Everything a repack does to two groups of one index and one layer each, in order; some of it without an
# exchange of names.
_STEPS: list[tuple[Any, str, str, int, bool]] = [
    (journal.Journal, "write", "before", 1, True),
    (journal.Journal, "write", "after", 1, True),
    (repacking, "_link_or_copy", "after", 2, True),
    (arrays.ObjectWriter, "put", "after", 1, True),
    (arrays.ObjectWriter, "put", "after", 3, True),
    (repacking, "write_metadata", "before", 1, True),
    (repacking, "_rewrite", "after", 1, True),
    (repacking, "_compare", "after", 1, True),
    (repacking, "_rewrite", "after", 2, True),
    (swap, "replace_group", "before", 1, True),
    (_files, "exchange", "after", 1, True),
    (swap, "replace_group", "after", 1, True),
    (swap, "discard", "before", 1, True),
    (swap, "discard", "after", 1, True),
    (journal.Journal, "remove", "after", 1, True),
    (swap, "replace_group", "before", 2, True),
    (swap, "replace_group", "after", 2, True),
    (repacking, "set_default_codec", "before", 1, True),
    (os, "rename", "before", 2, False),
    (os, "rename", "after", 2, False),  # the group is nowhere
    (os, "rename", "after", 3, False),
    (os, "rename", "after", 4, False),
    (swap, "replace_group", "after", 2, False),
]


def ids(step: tuple[Any, str, str, int, bool]) -> str:
    _, name, when, n, exchange = step
    return f"{when}-{name}-{n}" + ("" if exchange else "-renames")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "a"
    made = create_or_open_atlas(root, codec=HOMEOBOX)
    for seed, n in enumerate((60, 40)):
        x = sp.random(n, 8, 0.5, "csr", random_state=np.random.default_rng(seed))
        x.data = np.ceil(x.data * 9)
        obs = pd.DataFrame(index=[f"s{seed}c{i}" for i in range(n)])
        adata = anndata.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=list("abcdefgh")))
        made.add_from_anndata(adata, chunk_shape=32, shard_shape=64)
        made.optimize()
        made.snapshot()
    return root


@pytest.fixture
def atlas(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "a")


def digest(root: Path) -> list[tuple[Any, ...]]:
    """Everything the snapshots say."""
    out = []
    for version in (0, 1):
        found = RaggedAtlas.checkout(root, version).query().to_anndata()
        out.append((found.X.toarray().tolist(), found.obs.to_dict(), list(found.var_names)))
    return out


@pytest.fixture(scope="module")
def before(template: Path) -> list[tuple[Any, ...]]:
    """What the snapshots say before anything happens."""
    return digest(template)


def codecs(root: Path) -> list[set[str]]:
    """Of each group in place: the codecs of its arrays."""
    found = []
    for group in sorted((root / "zarr_store").glob("*/gene_expression")):
        documents = [json.loads(path.read_text()) for path in group.glob("csr/**/zarr.json")]
        found.append(
            {
                document["codecs"][0]["configuration"]["codecs"][1]["name"]
                for document in documents
                if document["node_type"] == "array"
            }
        )
    return found


def check_aftermath(root: Path, before: list[tuple[Any, ...]]) -> None:
    """What must hold after any accident."""
    store = root / "zarr_store"
    in_the_gap = len(list(store.glob("*/gene_expression"))) == 1
    if not in_the_gap:
        # Readers need no recovery.
        assert digest(root) == before
        assert all(len(found) == 1 for found in codecs(root))
    RaggedAtlas.open(root)  # any writer puts it in order
    assert not list((root / ".hbx_gpu").glob("*.json"))
    assert not (store / ".staging").exists()
    assert all(len(found) == 1 for found in codecs(root))
    assert len(codecs(root)) == 2
    if in_the_gap:
        assert digest(root) == before
    assert all(group.outcome in ("repacked", "unchanged") for group in repack(root, ROWPACK).groups)
    assert codecs(root) == [{ROWPACK}] * 2
    assert json.loads((root / "hbx_gpu.json").read_text())["codec"] == ROWPACK
    assert digest(root) == before
    assert RaggedAtlas.open(root).snapshot() == 2


class Died(BaseException):
    pass


@pytest.mark.parametrize("step", _STEPS, ids=ids)
def test_dying_at_any_step(
    atlas: Path,
    before: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str, str, int, bool],
) -> None:
    """As a kill would leave it: from that point on nothing is done, cleaning up included."""
    owner, name, when, n, exchange = step
    real, left = getattr(owner, name), [n]
    settle = swap.settle
    dead = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0] and when == "before":
            dead.append(True)
            raise Died
        result = real(*args, **kwargs)
        if not left[0]:
            dead.append(True)
            raise Died
        return result

    def settle_if_alive(*args: Any) -> None:
        if dead:
            raise Died
        settle(*args)

    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(_files, "exchange", lambda *_: False)
        patch.setattr(swap, "settle", settle_if_alive)
        patch.setattr(owner, name, dying)
        with pytest.raises(Died):
            repack(atlas, ROWPACK)
    check_aftermath(atlas, before)


@pytest.mark.parametrize(
    ("where", "when", "n", "exchange"),
    [
        pytest.param("atlas._writing.arrays:ObjectWriter.put", "after", 3, "yes", marks=pytest.mark.slow),
        pytest.param("atlas._catalog.swap:replace_group", "before", 1, "yes", marks=pytest.mark.slow),
        ("atlas._catalog.swap:replace_group", "after", 1, "yes"),
        ("_files:os.rename", "after", 2, "no"),
    ],
)
def test_killed(
    atlas: Path, before: list[tuple[Any, ...]], where: str, when: str, n: int, exchange: str
) -> None:
    killed(_repack_and_die, atlas, where, when, n, exchange == "yes")
    check_aftermath(atlas, before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_killed_at_any_time(atlas: Path, before: list[tuple[Any, ...]], seed: int) -> None:
    with fresh.popen([sys.executable, "-c", _SLOW_REPACK, atlas], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        time.sleep(np.random.default_rng(seed).random() * 2.5)
        run.kill()
    check_aftermath(atlas, before)


def test_killed_while_being_put_in_order(
    atlas: Path, before: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:

    def die(*_args: Any, **_kwargs: Any) -> None:
        raise Died

    def half_replaced(store: Path, note: Any) -> None:
        os.rename(store / note.zarr_group, paths.staging_path(store, note.staging) / swap.OLD)
        die()

    with monkeypatch.context() as patch:
        patch.setattr(_files, "exchange", lambda *_: False)
        patch.setattr(swap, "replace_group", half_replaced)
        patch.setattr(swap, "discard", die)  # so that settle() gets no further than restoring
        with pytest.raises(Died):
            repack(atlas, ROWPACK)
    assert digest(atlas) == before
    check_aftermath(atlas, before)


def test_a_note_waits_for_its_store(atlas: Path, tmp_path: Path, before: list[tuple[Any, ...]]) -> None:
    """Opened with another store, an atlas whose group is just nowhere does not forget where it is."""
    group = min(path.parent.name for path in (atlas / "zarr_store").glob("*/gene_expression"))
    note = journal.RepackNote(f"{group}/gene_expression", "s")
    notes = journal.Journal(atlas)
    notes.write(note)
    old = paths.staging_path(atlas / "zarr_store", "s") / swap.OLD
    old.parent.mkdir(parents=True)
    (atlas / "zarr_store" / note.zarr_group).rename(old)
    (tmp_path / "other").mkdir()
    swap.recover(notes, tmp_path / "other")
    assert notes.repacks() == [note]
    check_aftermath(atlas, before)


def test_the_default_is_set_only_where_there_is_one(tmp_path: Path) -> None:
    set_default_codec(tmp_path, ROWPACK)
    assert not list(tmp_path.iterdir())
