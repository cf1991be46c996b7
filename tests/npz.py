"""Files of several arrays, read whole and closed: `numpy.load` leaves them open."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a ``.npz`` file, by their names."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
