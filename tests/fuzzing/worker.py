"""One process of the fuzz: case after case, each told before it begins, so that a death has a name."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np

from hbx_gpu.errors import HbxError
from tests.fuzzing.mutate import damaged
from tests.fuzzing.targets import Content, Target, files_of, quiet, targets

_MEMORY = 6 << 30


def main(seed: int, plan: list[tuple[str, str, int, int]]) -> None:
    """Run cases `first` to `last` - 1 of each (target, folder of its store, first, last) of a plan."""
    quiet()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of Rust print
    known = {target.name: target for target in targets()}
    for name, folder, first, last in plan:
        _run(known[name], Path(folder), seed, first, last)


def _run(target: Target, root: Path, seed: int, first: int, last: int) -> None:
    expected = target.read(root)
    _limit()
    files = files_of(target, root)
    whole = {path: path.read_bytes() for paths in files.values() for path in paths}
    patterns = list(files)
    _tell({"target": target.name})
    for case in range(first, last):
        rng = np.random.default_rng([seed, zlib.crc32(target.name.encode()), case])
        pattern = patterns[case % len(patterns)]
        path = files[pattern][int(rng.integers(len(files[pattern])))]
        _tell({"case": case})
        path.write_bytes(damaged(rng, whole[path]))
        outcome, what = _outcome(target, root, expected)
        path.write_bytes(whole[path])
        told = {"done": case, "outcome": outcome, "file": str(path.relative_to(root))}
        _tell(told | {"kind": pattern, "checked": target.files[pattern], "what": what})


def _limit() -> None:
    """A few gigabytes more than a store that is whole takes; never more than before."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, hard))


def _outcome(target: Target, root: Path, expected: Content) -> tuple[str, str]:
    try:
        found = target.read(root)
    except (HbxError, FileNotFoundError) as error:
        return "refused", type(error).__name__
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "foreign", f"{type(error).__name__}: {str(error)[:150]} at {place.filename}:{place.lineno}"
    same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
    return ("same", "") if same else ("wrong", "")


def _tell(message: dict[str, object]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
