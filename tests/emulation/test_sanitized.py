"""Every kernel test once more with AddressSanitizer and UBSan watching each access of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulation import cases, sanitized

pytestmark = pytest.mark.usefixtures("gxx")

OVERRUN = """
import numpy as np
from pathlib import Path
from tests.emulation import EmulatedLauncher


def test_sound():
    pass


def test_overrun():
    launcher = EmulatedLauncher(files=[Path({file!r})])
    launcher.run("global_overrun", 1, 64, [np.zeros(16, np.uint32), np.zeros(1, np.uint32), np.uint32({n})])
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", cases.SOME_AND_ALL)
def test_kernels_access_only_what_they_may(more: dict[str, str]) -> None:
    status, output = sanitized.run(sanitized.KERNEL_TESTS, capture=True, more=more)
    assert status == 0, output[-20_000:]
    assert " passed" in output


@pytest.mark.parametrize("n", [15, 16])
def test_an_invalid_access_fails_the_run_and_is_named(tmp_path: Path, n: int) -> None:
    file = Path(__file__).parent / "planted" / "wrong.cu"
    test = tmp_path / "test_overrun.py"
    test.write_text(OVERRUN.format(file=str(file), n=n))
    status, output = sanitized.run([str(test)], capture=True)
    assert "test_sound PASSED" in output
    assert (status == 0) == (n == 15)
    assert ("heap-buffer-overflow" in output and "wrong.cu" in output) == (n == 16)
    assert ("test_overrun PASSED" in output) == (n == 15)
