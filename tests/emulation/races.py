"""Runs kernel tests under ThreadSanitizer: `python -m tests.emulation.races [--barriers] [pytest options]`.

Threads of a block know of one another's writes by barriers alone, so two accesses without a barrier between
them are a race whatever order they ran in. `--barriers` asks whether this notices: each barrier of each
kernel is removed once, and a run that reports nothing then fails. Races between blocks are not seen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import pytest

from hbx_gpu._engine.device import sources
from tests.emulation import cases
from tests.emulation.build import compiler_library, outer_environment

ROOT = Path(__file__).resolve().parents[2]
BARRIER = re.compile(r"\b__sync(?:threads|warp)\(\w*\);")
# Arguments of pytest for what meets every barrier of a file; for a header, the tests of all its users.
TESTS = {
    "bitpacking.cu": ["test_bitpacking.py"],
    "compact.cu": ["test_compact.py"],
    "densify.cu": ["test_densify.py"],
    "rowpack_csr.cu": ["test_rowpack_csr.py"],
    "rowpack_dense.cu": ["test_rowpack_dense.py"],
    "rowpack.cuh": ["test_rowpack_csr.py", "test_rowpack_dense.py"],
    "sentences.cu": ["test_tokens.py", "-k", "uce or state or gpt or same"],
    "smallest.cuh": ["test_tokens.py"],
    "sort_rows.cu": ["test_sort_rows.py"],
    "tokens.cu": ["test_tokens.py"],
    "tokens.cuh": ["test_tokens.py"],
}
# Their cases are those of the plain tests, drawn at random: slow under a sanitizer, and no new barriers.
# Two files launch nothing.
LEFT_OUT = [
    f"--ignore-glob=*{name}.py" for name in ("_properties", "_real", "test_compile", "test_flush_model")
]

# The forks find modules imported that pytest would rewrite.
_PYTEST = [
    "-W",
    "default::pytest.PytestAssertRewriteWarning",
    "-q",
    "-x",
    "-m",
    "not gpu and not slow",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
]
_INSIDE = "--inside"
_RACE = 66  # exit status of a process that ThreadSanitizer ends


@dataclass(frozen=True)
class Barrier:
    """A barrier in the text of a kernel file; lines count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def barriers() -> Iterator[Barrier]:
    """Yield all barriers of all kernels, but for those whose comment says that they are spare."""
    for path in sorted(sources.kernels_folder().iterdir()):
        if path.suffix in (".cu", ".cuh"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if BARRIER.search(line) and "// spare: " not in line:
                    yield Barrier(path.name, number)


def run(arguments: Sequence[str], *, more: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status of pytest over some tests, and its output with reports. The first race ends the process.

    `more` are environment variables, such as `cases.ALL`.
    """
    return _watched(["-m", "pytest", *_PYTEST, *arguments], more=more or {})


def reported(chosen: Sequence[Barrier]) -> list[bool]:
    """Whether tests report a race where each of these barriers is missing."""
    # Where a race lies is not asked, and the names of functions take longer than most races.
    status, output = _watched(["-m", __spec__.name, _INSIDE, *map(str, chosen)], symbolize=False)
    found = re.findall(r"^barrier (\S+) (reported|missed)$", output, re.MULTILINE)
    if [name for name, _ in found] != [str(barrier) for barrier in chosen]:
        raise RuntimeError(f"not every barrier has an answer (status {status}):\n{output[-8000:]}")
    return [answer == "reported" for _, answer in found]


def _watched(
    arguments: Sequence[str], *, symbolize: bool = True, more: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, str]:
    """Status and output of a Python with ThreadSanitizer, and its reports.

    Functions have names in the reports if `symbolize` is set.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **outer_environment(),
            "LD_PRELOAD": compiler_library("libtsan.so"),
            "TSAN_OPTIONS": ":".join(
                [
                    f"halt_on_error=1:exitcode={_RACE}:log_path={folder}/report",
                    f"symbolize={int(symbolize)}",
                ]
            ),
            "HBX_EMULATED_WATCH": "races",
            "HBX_EMULATED_ORDERS": "forward",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            # Threads of BLAS are none of ours, and a process with threads cannot be forked.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **more,
        }
        # The sanitizer's shadow memory has a fixed place, which randomized addresses may take.
        command = ["setarch", "-R", sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        reports = [file.read_text(errors="replace") for file in sorted(Path(folder).iterdir())]
    return done.returncode or int(bool(reports)), "\n".join([done.stdout, *reports])


class _OncePerBarrier:
    """Plugin of pytest: runs the collected tests without one barrier after another.

    Each time in a fork, since a race ends the process that has it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the first case of every test before all second cases: other tests meet other barriers."""
        seen: Counter[str] = Counter()
        places = {}
        for item in items:
            test = item.nodeid.partition("[")[0]
            places[item] = seen[test]
            seen[test] += 1
        items.sort(key=places.__getitem__)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Print for each barrier whether a race was reported without it."""
        for name in self._names:
            child = os.fork()
            if child == 0:
                os.environ["HBX_EMULATED_WITHOUT"] = name
                os._exit(_until_a_test_fails(session))
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            # Anything else is a run that did not come to an end, which says nothing about the barrier.
            answer = {_RACE: "reported", 0: "missed"}.get(code, f"ended with status {code}")
            print(f"\nbarrier {name} {answer}", flush=True)
        return True


def _until_a_test_fails(session: pytest.Session) -> int:
    for item, after in zip(session.items, [*session.items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return 1
    return 0 if session.items else 2


def _inside(names: Sequence[str]) -> None:
    """In the watched process: one fork per file, which all share what is imported before."""
    import hypothesis  # noqa: F401 - imported once for all forks, as the next two
    import torch  # noqa: F401

    import tests.tokens.recipes  # noqa: F401

    # Tests may look at this while they are collected; no barrier is called so.
    os.environ["HBX_EMULATED_WITHOUT"] = "none yet"
    folder = ROOT / "tests" / "kernels"
    for file, of_file in groupby(names, lambda name: name.partition(":")[0]):
        asked = [str(folder / part) if part.startswith("test_") else part for part in TESTS[file]]
        child = os.fork()
        if child == 0:
            os._exit(
                int(pytest.main([*_PYTEST, "--capture=no", *asked], plugins=[_OncePerBarrier([*of_file])]))
            )
        os.waitpid(child, 0)


def main(arguments: Sequence[str]) -> int:
    """Entry of the command."""
    if arguments and arguments[0] == _INSIDE:
        _inside(arguments[1:])
        return 0
    rest = [argument for argument in arguments if argument != "--barriers"]
    if len(rest) == len(arguments):
        status, output = run([*LEFT_OUT, *(rest or ["tests/kernels"])], more=cases.ALL)
        print(output)
        return status
    chosen = [barrier for barrier in barriers() if not rest or str(barrier) in rest or barrier.file in rest]
    answers = reported(chosen)
    for barrier, answer in zip(chosen, answers, strict=True):
        print(f"{barrier}: {'reported' if answer else 'NOT REPORTED'}")
    print(f"{sum(answers)} of {len(chosen)} missing barriers are reported")
    return int(not chosen or not all(answers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
