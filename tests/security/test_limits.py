"""Too little memory is said in words that name what it was wanted for."""

from __future__ import annotations

import pytest

from hbx_gpu._advice import within_memory
from hbx_gpu.errors import CorruptDataError, ResourceError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 16.0 GiB"),
        OSError("Could not find/load shared object file 'libllvmlite.so' from resource location"),
        ImportError("libx.so: cannot map zero-fill pages: Cannot allocate memory"),
    ],
    ids=repr,
)
def test_want_of_memory(error: BaseException) -> None:
    told = r"too little memory for the atlas at a .*; end other.*ulimit -v"
    with pytest.raises(ResourceError, match=told), within_memory("the atlas at a"):
        raise error


@pytest.mark.parametrize(
    "error", [OSError(2, "x"), ImportError("no module"), CorruptDataError("a"), ValueError("b")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, within_memory("the atlas at a"):
        raise error
    assert raised.value is error
