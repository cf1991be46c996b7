"""Every benchmark has a question, a command that runs, and a row in the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.commands import dispatch
from benchmarks.scdl import __main__ as scdl
from benchmarks.stages import __main__ as stages
from benchmarks.startup import __main__ as startup

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"scdl": scdl.QUESTIONS, "stages": stages.QUESTIONS, "startup": startup.QUESTIONS}


def commands() -> dict[str, str]:
    """Arguments of ``python -m benchmarks`` -> question, of all that measure."""
    single = {name: question for name, question in benchmarks.QUESTIONS.items() if name not in PACKAGES}
    return single | {f"{p} {name}": q for p, names in PACKAGES.items() for name, q in names.items()}


@pytest.mark.parametrize("command", sorted(commands()))
def test_a_command_prints_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dispatch("benchmarks", benchmarks.QUESTIONS, [*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m benchmarks.{command} " in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_documentation_has_a_row_with_the_question_of_each() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = dict(re.findall(r"^\| `python -m benchmarks\.([a-z_ ]+)` \| ([^|]*?\?)", page, re.M))
    assert rows == commands()


def test_nothing_else_in_the_folder_is_a_program() -> None:
    """Peers answer the comparison, jobs are started by measurements; the rest is listed."""
    guarded = {
        str(file.relative_to(ROOT / "benchmarks").with_suffix(""))
        for file in (ROOT / "benchmarks").rglob("*.py")
        if '__name__ == "__main__"' in file.read_text()
    }
    programs = {name for name in guarded if not name.startswith("peers/")} - {
        "jobs",
        "token_references",
        "__main__",
    }
    assert programs == {f"{n}/__main__" if n in PACKAGES else n for n in benchmarks.QUESTIONS}
    for package in PACKAGES:
        assert callable(import_module(f"benchmarks.{package}.__main__").main)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[3] for line in done.stdout.splitlines()] == list(benchmarks.QUESTIONS)
    assert dispatch("benchmarks", benchmarks.QUESTIONS, ["nonsense"]) == 2
    assert "'nonsense' is not one of these benchmarks" in capsys.readouterr().err
