"""The message for a framework that is not installed."""

from __future__ import annotations


def not_installed(extra: str, error: ImportError) -> ImportError:
    """Return the error to raise instead of `error`, which names the extra to install."""
    return ImportError(f"{error}. To install it: pip install 'hbx_gpu[{extra}]'", name=error.name)
