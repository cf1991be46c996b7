"""Names of test cases that are the same in every process, which running them side by side needs."""

from __future__ import annotations

import re


def stable(value: object) -> str:
    """The text of a value without addresses of functions and objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
