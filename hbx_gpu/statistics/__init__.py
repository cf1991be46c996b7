"""Statistics of features: means, variances, medians and highly variable features, in one pass.

``RaggedAtlas.statistics()`` and the queries' method of that name compute and keep them; :func:`compute` takes
any dataset of cells. docs/statistics.md says what every number means.
"""

from __future__ import annotations

from hbx_gpu.statistics._compute import compute
from hbx_gpu.statistics._result import Statistics

__all__ = ["Statistics", "compute"]
