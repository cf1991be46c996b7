"""Does a test notice when the code is wrong? ``make mutants`` changes one place at a time and runs the tests.

Two kinds of mutants: those of ``mutants.toml``, written by hand because they once survived, and drawn ones:
a comparison, an operator, a number, a condition or a statement of a module is changed, chosen by a seed.
Each runs against the test files that `TESTS` names for its module, in a copy of the tree, and counts as
killed if they fail or take ten times as long. ``mutants.toml`` also lists the drawn ones that change nothing
a test could see, with the reason.

    python -m tests.mutants --named
    python -m tests.mutants hbx_gpu/sampler --count 40 --seed 1
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LISTED = Path(__file__).with_suffix(".toml")

# Which tests should notice a change of a module; the longest beginning of its path counts.
TESTS = {
    "hbx_gpu/_plan/": ["tests/test_plan.py", "tests/test_residency.py"],
    "hbx_gpu/_plan/rows.py": ["tests/test_plan.py"],
    "hbx_gpu/_plan/boxes.py": ["tests/test_plan_boxes.py"],
    "hbx_gpu/_engine/": ["tests/engine/test_engines.py", "tests/engine/test_dense.py"],
    "hbx_gpu/_engine/host/boxes": ["tests/test_plan_boxes.py"],
    "hbx_gpu/_engine/host/decoded": ["tests/test_plan_boxes.py"],
    "hbx_gpu/_engine/host/canonical": ["tests/engine/test_canonical.py"],
    "hbx_gpu/_engine/verify.py": ["tests/engine/test_checksums.py"],
    "hbx_gpu/_engine/device/": ["tests/engine/test_staging.py", "tests/engine/test_device_engine.py"],
    "hbx_gpu/_engine/device/nvcomp.py": ["tests/engine/test_nvcomp.py"],
    "hbx_gpu/_engine/device/compressed.py": ["tests/engine/test_device_general.py"],
    "hbx_gpu/_engine/device/cuda.py": ["tests/engine/test_cuda_devices.py", "tests/engine/test_streams.py"],
    "hbx_gpu/_engine/device/planned.py": ["tests/test_planned.py"],
    "hbx_gpu/_engine/device/stag": ["tests/engine/test_staging.py"],
    "hbx_gpu/_engine/device/store.py": ["tests/test_residency.py"],
    "hbx_gpu/_storage/": ["tests/storage"],
    "hbx_gpu/_storage/cache.py": ["tests/remote/test_cache.py"],
    "hbx_gpu/_storage/choice.py": ["tests/storage/test_choice.py"],
    "hbx_gpu/_storage/chunks.py": ["tests/storage/test_chunks.py", "tests/storage/test_readers.py"],
    "hbx_gpu/_storage/file_identity.py": ["tests/storage/test_zarr_arrays.py"],
    "hbx_gpu/_storage/hdf5.py": ["tests/storage/test_hdf5.py"],
    "hbx_gpu/_storage/kvikio.py": ["tests/storage/test_kvikio.py"],
    "hbx_gpu/_storage/maps.py": ["tests/storage/test_readers.py"],
    "hbx_gpu/_storage/metadata.py": [
        "tests/storage/test_metadata.py",
        "tests/storage/test_zarr_arrays.py",
        "tests/storage/test_untrusted.py",
    ],
    "hbx_gpu/_storage/pinned.py": ["tests/storage/test_pinned.py"],
    "hbx_gpu/_storage/plain.py": ["tests/storage/test_plain.py"],
    "hbx_gpu/_storage/prefetch.py": ["tests/remote/test_prefetch.py"],
    "hbx_gpu/_storage/readers.py": ["tests/storage/test_readers.py", "tests/storage/test_chunks.py"],
    "hbx_gpu/_storage/remote.py": ["tests/remote/test_cache.py", "tests/remote/test_locality.py"],
    "hbx_gpu/_remote/": ["tests/remote"],
    "hbx_gpu/_remote/fetch.py": ["tests/remote/test_fetch.py"],
    "hbx_gpu/_remote/link.py": ["tests/remote/test_fetch.py"],
    "hbx_gpu/_remote/lease.py": ["tests/remote/test_writing.py", "-k", "lease or second_writer"],
    "hbx_gpu/_remote/places.py": ["tests/remote/test_places.py"],
    # Not the tests that start a job of several processes for each launcher.
    "hbx_gpu/sampler/": ["tests/sampler", "--ignore=tests/sampler/test_launchers.py"],
    "hbx_gpu/sampler/_permutation": ["tests/sampler/test_permutation.py"],
    "hbx_gpu/sampler/_splits.py": ["tests/sampler/test_splits.py"],
    "hbx_gpu/sampler/_selection": ["tests/sampler/test_selection.py"],
    "hbx_gpu/sampler/_sets.py": ["tests/sampler/test_sets.py"],
    "hbx_gpu/sampler/_neighbors.py": ["tests/sampler/test_neighbors.py"],
    "hbx_gpu/sampler/_lanes.py": ["tests/sampler/test_lanes.py"],
    "hbx_gpu/_loading/": [
        *("tests/test_loader.py", "tests/test_loader_resume.py"),
        *("tests/system/test_faults.py", "tests/test_sizing.py"),
    ],
    "hbx_gpu/_loading/dali/": ["tests/test_executors.py"],
    "hbx_gpu/_loading/dense_size.py": ["tests/test_wide_vocabulary.py"],
    "hbx_gpu/_loading/measured.py": ["tests/test_measured.py"],
    "hbx_gpu/_loading/pairs.py": ["tests/sampler/test_neighbors.py"],
    "hbx_gpu/_loading/residency/": ["tests/test_residency.py"],
    "hbx_gpu/_loading/splits.py": ["tests/test_splits.py"],
    "hbx_gpu/_loading/token": ["tests/tokens/test_loader.py"],
    # Not the tests that measure a loader: a busy machine decides them too.
    "hbx_gpu/_loading/sizing.py": ["tests/test_sizing.py", "-k", "not the_loader"],
    "hbx_gpu/_loading/feeds/device.py": ["tests/test_device_loader.py"],
    "hbx_gpu/_loading/feeds/host.py": ["tests/test_loader.py"],
    "hbx_gpu/_loading/feeds/multimodal.py": [
        *("tests/test_multimodal.py", "tests/test_multimodal_images.py"),
        "tests/test_dense_device.py",
    ],
    "hbx_gpu/_loading/feeds/tokens.py": ["tests/tokens/test_loader.py"],
    "hbx_gpu/_codecs/": ["tests/codecs"],
    "hbx_gpu/_codecs/bitpacking": ["tests/codecs/test_bitpacking.py"],
    "hbx_gpu/_codecs/blosc_blocks.py": ["tests/codecs/test_blosc_blocks.py"],
    "hbx_gpu/_codecs/bounds.py": ["tests/codecs/test_bounds.py"],
    "hbx_gpu/_codecs/chain.py": ["tests/codecs/test_chain.py"],
    "hbx_gpu/_codecs/checksum.py": ["tests/codecs/test_checksum.py"],
    "hbx_gpu/_codecs/containers.py": ["tests/codecs/test_containers.py"],
    "hbx_gpu/_codecs/lzf.py": ["tests/codecs/test_lzf.py"],
    "hbx_gpu/_codecs/rowpack": ["tests/codecs/test_rowpack.py", "tests/codecs/test_rowpack_zarr.py"],
    "hbx_gpu/_codecs/zarr_codec.py": ["tests/codecs/test_zarr_codec.py", "tests/codecs/test_rowpack_zarr.py"],
    "hbx_gpu/statistics/": ["tests/statistics/test_compute.py", "tests/statistics/test_variable.py"],
    "hbx_gpu/atlas/_ingest/batch.py": ["tests/atlas/test_ingest_many.py"],
}

PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not timing"]
# `preload` imports zarr, a package with a plugin, before pytest could rewrite its assertions.
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]

COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: what stood there, and what stands there instead."""

    path: str
    line: int
    old: str
    new: str
    source: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old!r} -> {self.new!r}"


class _Places(ast.NodeVisitor):
    """Collects (node, new text) for whatever can be changed; messages, types and docstrings cannot."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[tuple[ast.AST, str]] = []

    def _text(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node) or ""

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error's text is not looked into."""

    visit_JoinedStr = visit_AnnAssign = visit_Import = visit_ImportFrom = visit_Raise  # type: ignore[assignment]

    def _body(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """Neither decorators (``frozen=True``) nor defaults and types."""
        for statement in node.body:
            self.visit(statement)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _body  # type: ignore[assignment]

    def visit_Compare(self, node: ast.Compare) -> None:
        """Another comparison."""
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            new = COMPARISONS[type(node.ops[0])]
            self.found.append((node, f"({self._text(node.left)} {new} {self._text(node.comparators[0])})"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Another operator."""
        if type(node.op) in OPERATORS:
            new = OPERATORS[type(node.op)]
            self.found.append((node, f"(({self._text(node.left)}) {new} ({self._text(node.right)}))"))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """All instead of any, any instead of all."""
        word = " or " if isinstance(node.op, ast.And) else " and "
        self.found.append((node, f"({word.join(f'({self._text(v)})' for v in node.values)})"))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """No negation."""
        if isinstance(node.op, ast.Not | ast.Invert | ast.USub):
            self.found.append((node, f"({self._text(node.operand)})"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """The next number, the other truth."""
        if isinstance(node.value, bool):
            self.found.append((node, str(not node.value)))
        elif isinstance(node.value, int):
            self.found.append((node, str(node.value + 1)))

    def visit_Call(self, node: ast.Call) -> None:
        """Not the options of a compiler, which change no result."""
        if not self._text(node.func).endswith("njit"):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """Never; not the imports that only a type checker sees."""
        if self._text(node.test) != "TYPE_CHECKING":
            self.found.append((node.test, "False"))
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call that is left out."""
        if isinstance(node.value, ast.Call):
            self.found.append((node, "pass"))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """A step that is left out."""
        self.found.append((node, "pass"))
        self.generic_visit(node)


def tests_of(path: str) -> tuple[str, ...]:
    """Test files that should notice a change of a module."""
    best = max((key for key in TESTS if path.startswith(key)), key=len, default="")
    if not best:
        raise SystemExit(f"no tests are named for {path}; add it to TESTS of tests/mutants.py")
    return tuple(TESTS[best])


def mutants_of(path: str) -> list[Mutant]:
    """All drawn mutants of a module, in the order of its text."""
    source = (ROOT / path).read_text()
    places = _Places(source)
    places.visit(ast.parse(source))
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node, new in places.found:
        begin = lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        raw = source.encode()
        changed = (raw[:begin] + new.encode() + raw[end:]).decode()
        old = raw[begin:end].decode()
        found.append(Mutant(path, node.lineno, old, new, changed, tests_of(path)))  # type: ignore[attr-defined]
    return found


def named() -> list[Mutant]:
    """The mutants that were written by hand."""
    found = []
    for entry in listed("named"):
        source = (ROOT / entry["path"]).read_text()
        if source.count(entry["old"]) != 1:
            raise SystemExit(f"{entry['path']} does not hold {entry['old']!r} once: mend {LISTED.name}")
        line = source[: source.index(entry["old"])].count("\n") + 1
        changed = source.replace(entry["old"], entry["new"])
        tests = tuple(entry.get("tests") or tests_of(entry["path"]))
        found.append(Mutant(entry["path"], line, entry["old"], entry["new"], changed, tests))
    return found


def listed(kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in mutants.toml: ``named`` or ``equivalent``."""
    found: list[dict[str, Any]] = tomllib.loads(LISTED.read_text())[kind]
    return found


def fits(entry: dict[str, Any], mutant: Mutant) -> bool:
    """Whether an entry of mutants.toml means this mutant."""
    same = (entry["path"], entry["old"], entry["new"]) == (mutant.path, mutant.old, mutant.new)
    line = (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1]
    return same and entry.get("line", "") in line


def copy_tree(target: Path) -> None:
    """What git knows of the tree, uncommitted changes included."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def preload() -> None:
    """Import what tests import from others, once for all mutants: children are forks of this process."""
    for name in (
        "pytest",
        "hypothesis",
        "numpy",
        "scipy.sparse",
        "pandas",
        "zarr",
        "h5py",
        "anndata",
        "torch",
    ):
        try:
            __import__(name)
        except ImportError:
            continue


def run(tree: Path, tests: Sequence[str], *, seconds: float, cache: Path) -> tuple[str, float]:
    """Run tests in a child; ``passed``, ``failed`` or ``slow``, and the seconds it took."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os.chdir(tree)
        os.environ.update(NUMBA_CACHE_DIR=str(cache), PYTHONPATH=str(tree), HBX_SHARED=str(shared()))
        for name in [n for n in sys.modules if n.partition(".")[0] in ("hbx_gpu", "tests", "benchmarks")]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
        import pytest

        os._exit(int(pytest.main([*PYTEST, *tests])))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        took = time.monotonic() - begin
        if done:
            return ("passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"), took
        if took > seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "slow", took
        time.sleep(0.05)


def shared() -> Path:
    """Real data that some tests read, as ``tests/conftest.py`` finds it for this tree."""
    return Path(os.environ.get("HBX_SHARED", ROOT.parent / "shared")).resolve()


def drawn(paths: Sequence[str], count: int, seed: int) -> Iterator[Mutant]:
    """`count` mutants of the modules below `paths`, chosen by `seed`."""
    modules = sorted(
        str(file.relative_to(ROOT))
        for path in paths
        for file in ([ROOT / path] if (ROOT / path).is_file() else (ROOT / path).glob("**/*.py"))
    )
    possible = [mutant for module in modules for mutant in mutants_of(module)]
    chosen = random.Random(seed).sample(possible, min(count, len(possible)))
    known = listed("equivalent")
    yield from (mutant for mutant in chosen if not any(fits(entry, mutant) for entry in known))


def compiled(path: str) -> bool:
    """Whether a module holds numba kernels: whoever calls one of them has it inside its own machine code."""
    return "njit" in (ROOT / path).read_text()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutants; 1 if one survives or could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="modules or folders to draw from (default: those of TESTS)")
    parser.add_argument("--named", action="store_true", help="the mutants of mutants.toml instead")
    parser.add_argument("--count", type=int, default=100, help="how many to draw (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no further mutant afterwards"
    )
    options = parser.parse_args(arguments)

    mutants = (
        named() if options.named else list(drawn(options.paths or [*TESTS], options.count, options.seed))
    )
    preload()
    survivors: list[Mutant] = []
    unmeasured: list[Mutant] = []
    tally, limits = {"passed": 0, "failed": 0, "slow": 0}, {}
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="hbx_gpu-mutants-") as folder:
        tree, cache = Path(folder, "tree"), Path(folder, "numba")
        copy_tree(tree)
        for mutant in mutants:
            if time.monotonic() > end:
                print(f"time is up after {sum(tally.values())} of {len(mutants)} mutants")
                break
            if mutant.tests not in limits:
                # Twice: what kernels take to compile is no measure.
                for _ in range(2):
                    result, took = run(tree, mutant.tests, seconds=1800, cache=cache)
                limits[mutant.tests] = 30 + 10 * took if result == "passed" else 0
                if result != "passed":
                    print(f"NOT MEASURED: {' '.join(mutant.tests)} fail without any change", flush=True)
            if not limits[mutant.tests]:
                unmeasured.append(mutant)
                continue
            file = tree / mutant.path
            plain = file.read_bytes()
            file.write_text(mutant.source)
            own = Path(folder, "own") if compiled(mutant.path) else cache
            try:
                result, took = run(tree, mutant.tests, seconds=limits[mutant.tests], cache=own)
            finally:
                file.write_bytes(plain)
                shutil.rmtree(Path(folder, "own"), ignore_errors=True)
            tally[result] += 1
            if result == "passed":
                survivors.append(mutant)
            word = "SURVIVED" if result == "passed" else "killed"
            print(f"{word} in {took:.0f} s: {mutant}", flush=True)
    print(
        f"{sum(tally.values())} mutants: {tally['failed']} killed, {tally['slow']} killed by taking too "
        f"long, {len(survivors)} survived, {len(unmeasured)} not measured"
    )
    return 1 if survivors or unmeasured else 0


if __name__ == "__main__":
    sys.exit(main())
