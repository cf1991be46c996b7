"""Kernels under ThreadSanitizer: no races, and every barrier is needed."""

from __future__ import annotations

import pytest

from tests.emulation import cases, races

pytestmark = pytest.mark.usefixtures("gxx")

FILES = sorted({barrier.file for barrier in races.barriers()})
# They have most of the barriers, and their tests take minutes under the sanitizer: `make races` asks them.
SLOW = {"sentences.cu", "smallest.cuh", "tokens.cu", "tokens.cuh"}


# Two runs, which may go side by side.
@pytest.mark.slow
@pytest.mark.parametrize("more", cases.SOME_AND_ALL)
@pytest.mark.parametrize("part", ["tests/kernels/test_tokens.py", "tests/kernels"])
def test_threads_of_a_block_meet_before_they_read(part: str, more: dict[str, str]) -> None:
    others = ["--ignore=tests/kernels/test_tokens.py"] if part == "tests/kernels" else []
    status, output = races.run([*races.LEFT_OUT, *others, part], more=more)
    assert status == 0, output[-20_000:]
    assert " passed" in output


def test_every_kernel_with_barriers_has_tests_that_meet_them() -> None:
    assert sorted(races.TESTS) == FILES


@pytest.mark.slow
def test_a_missing_barrier_is_reported() -> None:
    chosen = [barrier for barrier in races.barriers() if barrier.file not in SLOW]
    assert {barrier.file for barrier in chosen} == {*FILES} - SLOW
    missed = [str(b) for b, found in zip(chosen, races.reported(chosen), strict=True) if not found]
    assert missed == [], "no race is reported without these barriers: needless, or not met by any test"
