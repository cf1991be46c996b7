"""A writer that is killed, at any of its steps, leaves the old archive or the new one, whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import fresh
from tests.scdl.files import counts, h5ad

# Kills copies of itself, each before another one of the steps that touch a file.
# Only copies use Arrow: its threads do not survive a fork.
CHILD = '''
import os, shutil, signal, sys, warnings
from pathlib import Path

from hbx_gpu import _files
from hbx_gpu.scdl._writing.cast import cast_archive
from hbx_gpu.scdl._api.collection import SingleCellCollection
from hbx_gpu.scdl._writing.concat import concat_archives
from hbx_gpu.scdl._writing.convert import convert_h5ad
from hbx_gpu.scdl._writing import new_folder
from hbx_gpu.scdl._writing.new_folder import recover
from tests.scdl.files import content, leftovers

warnings.simplefilter("ignore")
root, operation, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "exchange"
# A kill leaves the system's cache alone; only a power cut needs what this waits for.
os.fsync = lambda _: None
if not exchange:
    _files.exchange = lambda a, b: False
work = root / "work"
target = work / "archive"

def prepare():
    work.mkdir()
    if operation == "flatten":
        collection = SingleCellCollection(work / "collection")
        for name in ("one", "two"):
            collection.load_h5ad(root / f"{name}.h5ad")
    if operation != "create":
        convert_h5ad(root / "one.h5ad", target)
    shutil.copytree(work, root / "start")

def restart():
    shutil.rmtree(work)
    shutil.copytree(root / "start", work)

def run():
    if operation in ("create", "replace"):
        convert_h5ad(root / "two.h5ad", target, overwrite=operation == "replace")
    elif operation == "cast":
        cast_archive(target, "uint8")
    elif operation == "concat":
        concat_archives([target, target], target, overwrite=True)
    else:
        SingleCellCollection.open(work / "collection").flatten(target, True, overwrite=True)

def copy(function, *args):
    child = os.fork()
    if not child:
        try:
            function(*args)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def touches(event, args):
    """Whether something is about to happen to a file; names are exchanged through ctypes."""
    if event == "ctypes.dlsym":
        return True
    return (event.startswith("os.") or event == "open") and any(str(work) in str(a) for a in args)

def killed_at(step):
    left = step
    def hook(event, args):
        nonlocal left
        if touches(event, args):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    run()

def state():
    recover(target)
    return content(target) if target.exists() else None

def remember(name):
    (root / name).write_text(repr(state()))

def check(step):
    found = repr(state())
    allowed = {name: (root / name).read_text() for name in ("old", "new")}
    assert found in allowed.values(), f"step {step}: {found[:200]}"
    if operation == "flatten" and found == allowed["old"]:
        assert {p.name for p in (work / "collection").iterdir()} == {"one", "two", "version.json"}
    print(next(name for name in allowed if allowed[name] == found), flush=True)

def check_and_finish(step):
    check(step)
    finish(step)

def finish(step):
    """The next writer is not hindered, and sweeps up."""
    if repr(state()) != (root / "new").read_text():
        run()
    assert repr(state()) == (root / "new").read_text(), f"step {step}"
    assert not leftovers(work), f"step {step}: {leftovers(work)}"

def count():
    steps = 0
    def hook(event, args):
        nonlocal steps
        steps += touches(event, args)
    def publish(*args, **kwargs):
        discard = new_folder.NewFolder.discard
        def measured(self):
            nonlocal before
            before = before or steps
            discard(self)
        new_folder.NewFolder.discard = measured
        original(*args, **kwargs)
    before, original = 0, new_folder.NewFolder.publish
    new_folder.NewFolder.publish = publish
    sys.addaudithook(hook)
    run()
    (root / "steps").write_text(str(steps))
    (root / "after").write_text(str(steps - before))

assert not copy(prepare) and not copy(remember, "old") and not copy(count) and not copy(remember, "new")
steps = int((root / "steps").read_text())
# All steps around the swap, a sample of those before and of sweeping up after.
swapped = steps - int((root / "after").read_text())
sample = range(0, steps, max(9, steps // 12))
for step in sorted({*sample, *range(swapped - 8, min(swapped + 5, steps))}):
    restart()
    status = copy(killed_at, step)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"step {step}: {status}"
    assert not copy(check_and_finish, step), f"step {step}"
'''


@pytest.mark.parametrize(
    ("operation", "exchange"),
    [
        ("create", "exchange"),
        pytest.param("replace", "exchange", marks=pytest.mark.slow),
        ("replace", "two renames"),
        pytest.param("cast", "exchange", marks=pytest.mark.slow),
        pytest.param("concat", "two renames", marks=pytest.mark.slow),
        pytest.param("flatten", "exchange", marks=pytest.mark.slow),
    ],
)
def test_old_or_new_after_a_kill_at_any_step(tmp_path: Path, operation: str, exchange: str) -> None:
    h5ad(tmp_path / "one.h5ad", counts(3, 4, seed=1))
    h5ad(tmp_path / "two.h5ad", counts(2, 4, seed=2))
    repository = Path(__file__).parents[2]
    done = fresh.run(
        [sys.executable, "-c", CHILD, str(tmp_path), operation, exchange], timeout=300, cwd=repository
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = done.stdout.split()
    assert len(found) > 12
    # Both ends of the swap were seen, and nothing goes back to old once it was new.
    assert found == sorted(found, reverse=True)
    assert json.dumps(sorted(set(found))) == '["new", "old"]'
