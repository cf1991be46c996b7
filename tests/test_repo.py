"""The repository as a reader meets it: links lead somewhere, documented code runs and prints what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.synthetic import write_demo_pair, write_h5ad
from tests import mutants
from tests.emulation.build import outer_environment
from tests.pages import FENCE, blocks

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "# train.py\n"  # how a block begins that is a script of its own
# Packages of which a page has a block beside others.
ABSENT = [name for name in ("jax", "transformers") if importlib.util.find_spec(name) is None]


def markdown_files() -> list[Path]:
    """Tracked pages; all pages where this is no git checkout."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.md"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts derive them."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"])
def test_a_project_has(name: str) -> None:
    assert (ROOT / name).stat().st_size > 1_000


def test_license_is_the_whole_apache_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_two_steps_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ingest and the whole script run as they stand; run again, the script continues from its checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_h5ad(f"{name}.h5ad", 600, 80)
    found = list(blocks(ROOT / "README.md"))
    command = next(text for language, text in found if language == "sh" and "ingest" in text).split()
    assert command[0] == "hbx-gpu"
    assert cli.main(command[1:]) == 0
    script = next(text for language, text in found if language == "python")
    code = compile(script, "README.md", "exec", dont_inherit=True)
    capsys.readouterr()
    exec(code, {"__name__": "__main__"})
    assert re.findall(r"epoch (\d): 80 genes, loss \d", capsys.readouterr().out) == ["0", "1", "2"]
    exec(code, {"__name__": "__main__"})
    assert re.findall(r"epoch (\d)", capsys.readouterr().out) == ["2"]


@pytest.mark.parametrize(
    "name",
    [
        *("frameworks", "guide", "homeobox", "multimodal", "scvi"),
        *("stores", "testing", "training", "transformer"),
    ],
)
def test_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every Python block of a page, one after the other in one session."""
    if name == "multimodal":
        pytest.importorskip("nvidia.dali")
    if name in (needed := {"frameworks": "lightning", "scvi": "scvi"}):
        pytest.importorskip(needed[name])
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / f"{name}.md"
    namespace: dict[str, object] = {"__name__": "__main__"}
    sources = [
        text for language, text in blocks(page) if language == "python" and not text.startswith(SCRIPT)
    ]
    fewer = {"frameworks": 2, "homeobox": 1, "scvi": 2, "stores": 0, "testing": 2, "transformer": 2}
    assert len(sources) > fewer.get(name, 5)
    for number, source in enumerate(sources):
        if any(f"import {package}\n" in source or f"from {package} " in source for package in ABSENT):
            continue
        exec(compile(source, f"{page}, block {number}", "exec", dont_inherit=True), namespace)


@pytest.mark.timeout(300)
def test_the_script_for_several_processes_runs_under_torchrun(tmp_path: Path) -> None:
    """As it stands, with two processes: each cell comes once per epoch."""
    found = list(blocks(ROOT / "docs" / "training.md"))
    script = next(text for language, text in found if language == "python" and text.startswith(SCRIPT))
    launcher, flag, count, file = next(text for _, text in found if text.startswith("torchrun")).split()
    assert (launcher, flag, count, f"# {file}\n") == ("torchrun", "--nproc-per-node", "4", SCRIPT)
    (tmp_path / file).write_text(script)
    write_demo_pair(tmp_path / "data", n_obs=(150, 111), n_vars=40)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", flag, "2", file],
        cwd=tmp_path,
        env={**outer_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"epoch {epoch}: 261 cells on 2 ranks" for epoch in range(2)]
    assert (tmp_path / "ddp.pt").exists()


def test_the_commands_of_the_page_on_ingest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the first block, in this process, without those that need a cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        write_h5ad(f"data/{name}.h5ad", 20, 10)
    commands = next(text for language, text in blocks(ROOT / "docs" / "ingest.md") if language == "sh")
    lines = [
        line.partition("#")[0] for line in commands.splitlines() if "--dask tcp" not in line.partition("#")[0]
    ]
    assert len(lines) >= 5
    for line in lines:
        program, *words = line.replace("data/*.h5ad", "data/a.h5ad data/b.h5ad").split()
        assert program == "hbx-gpu"
        assert (
            cli.main(["1" if before == "--workers" else word for before, word in pairwise(["", *words])]) == 0
        )


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Dask leaves sockets to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_python_of_the_page_on_ingest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small cluster; Slurm is for those who have it."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    sources = [text for language, text in blocks(ROOT / "docs" / "ingest.md") if language == "python"]
    sources = [text for text in sources if "SLURMCluster" not in text]
    assert len(sources) == 2
    assert "tcp://host:8786" in sources[1]
    namespace: dict[str, object] = {"__name__": "__main__"}
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        for source in sources:
            here = source.replace("tcp://host:8786", cluster.scheduler_address)
            exec(here.replace("/shared/atlas", str(tmp_path / "shared")), namespace)
    for name in ("many_atlas", "shared"):
        assert RaggedAtlas.open(tmp_path / name).catalog.obs("cells").count_rows() == 500


def test_the_python_of_the_page_on_scale_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the only rank; Ray Train is for those who have it."""
    write_h5ad(tmp_path / "a.h5ad", 40, 10)
    assert cli.main(["ingest", str(tmp_path / "a.h5ad"), "--atlas", str(tmp_path / "atlas")]) == 0
    sources = [text for language, text in blocks(ROOT / "docs" / "scale.md") if language == "python"]
    script = next(text for text in sources if "init_process_group" in text)
    one_line = next(text for text in sources if "dataset.group_runs" in text and "import" not in text)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, object] = {"__name__": "__main__"}
    assert "/data/atlas" in script
    try:
        exec(script.replace("/data/atlas", str(tmp_path / "atlas")), namespace)
        exec(one_line, namespace)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert len(namespace["batch"]["index"]) == 40  # type: ignore[index]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Whatever an outer make was told is not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_make_lists_its_commands() -> None:
    listed = [line.split()[1] for line in make("-s", "help").stdout.splitlines()]
    expected = "help demo test long fast frameworks lint changelog typecheck docs bench fuzz races mutants"
    assert listed == [*expected.split(), "rehearse", "gpu", "clean"]


@pytest.mark.parametrize(
    ("chosen", "expected"), [("cpu", '".[test]" -c constraints.txt'), ("gpu", '".[gpu,test]"\n')]
)
def test_make_installs_the_chosen_set(tmp_path: Path, chosen: str, expected: str) -> None:
    """Neither set may pin the other's torch."""
    plan = make("-n", "test", f"SET={chosen}", f"VENV={tmp_path / 'none'}").stdout
    assert expected in re.sub(r" +\n", "\n", plan)


def test_make_refuses_an_unknown_set() -> None:
    done = make("test", "SET=tpu")
    assert done.returncode != 0
    assert "SET is 'tpu'; expected cpu or gpu" in done.stderr


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.8.20"; else exit 1; fi\n')
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", f"VENV={tmp_path / 'none'}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.8.20" in done.stderr
    assert not (tmp_path / "none").exists()


def test_every_fragment_of_the_changelog_has_a_type() -> None:
    """Towncrier leaves a file with another ending out, without a word."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    types = {entry["directory"] for entry in project["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changes").iterdir():
        if path.name != "_template.md":
            assert re.fullmatch(rf"[a-z0-9-]+\.({'|'.join(types)})\.md", path.name), path.name
            assert path.read_text().strip()


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    """What CI runs as the oldest is what pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["multimodal"]]
    bounds = {name: version for name, _, version in (text.partition(">=") for text in wanted) if version}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == bounds.keys()
    for name, version in bounds.items():
        assert pins[name].removesuffix(".0").removesuffix(".0") == version.removesuffix(".0"), name


def test_mutants_are_told_apart_by_tests_that_fail(tmp_path: Path) -> None:
    """With the options of this project, and a package with a plugin of pytest imported before pytest."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, result in (("right", 2), ("wrong", 3)):
        (tmp_path / f"test_{name}.py").write_text(f"def test_sum():\n    assert 1 + 1 == {result}\n")
    code = (
        "import sys, zarr; from pathlib import Path; from tests import mutants; "
        "print(*(mutants.run(Path(sys.argv[1]), [f'test_{name}.py'], seconds=60, cache=Path(sys.argv[1]))[0] "
        "for name in ('right', 'wrong')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, env=outer_environment(), capture_output=True, text=True)
    assert found.stdout.split() == ["passed", "failed"], found.stderr


def test_every_module_of_the_mutated_rooms_has_tests_that_exist() -> None:
    rooms = ("_plan", "_engine", "_storage", "sampler", "_loading", "_codecs", "_remote", "statistics")
    for file in (file for room in rooms for file in (ROOT / "hbx_gpu" / room).rglob("*.py")):
        for test in mutants.tests_of(file.relative_to(ROOT).as_posix()):
            assert not test.startswith("tests/") or (ROOT / test).exists(), test


def test_mutants_by_name_still_fit_the_code() -> None:
    """Each change of tests/mutants.toml finds its place, and leaves text that compiles."""
    for mutant in mutants.named():
        compile(mutant.source, mutant.path, "exec")
        files = [test.partition("::")[0] for test in mutant.tests if test.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)
    for entry in mutants.listed("equivalent"):
        assert any(mutants.fits(entry, mutant) for mutant in mutants.mutants_of(entry["path"])), entry
