"""One atlas per session, copied for every test; and a folder outside, with a canary in it."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.stores import make_atlas, read

_SECONDS = 60
_MEMORY = 8 << 30


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas that nobody changes. It was read, so that no test's time goes into compiling."""
    made = make_atlas(tmp_path_factory.mktemp("made") / "atlas")
    read(made)
    return made


@pytest.fixture
def atlas(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "atlas"))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the atlas that nothing may touch."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "thesis.txt").write_text("alive")
    (folder / "deep" / "thesis.txt").write_text("alive")
    return folder


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """What waits or allocates without end fails instead."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not done after {_SECONDS} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, before[1]))
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    resource.setrlimit(resource.RLIMIT_AS, before)
