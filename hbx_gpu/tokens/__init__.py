"""Model-ready batches: tokens of published single-cell foundation models, made where the rows are.

Recipes say what a model is fed; ``make_loader(layout="tokens", tokens=recipe)`` and :func:`encode` make it.
docs/tokens.md has a page for each model.
"""

from __future__ import annotations

from hbx_gpu.tokens._compile import Compiled, Report
from hbx_gpu.tokens._compile import compile_recipe as compile  # noqa: A004
from hbx_gpu.tokens._encode import encode
from hbx_gpu.tokens._presets import (
    bionemo_geneformer,
    cellarium_geneformer,
    geneformer_v1,
    geneformer_v2,
    nicheformer,
    scfoundation,
    scgpt,
    scprint,
    tahoe_x1,
    transcriptformer,
)
from hbx_gpu.tokens._recipes import (
    ExpressedGenes,
    MaskTokens,
    MaskValues,
    ObsTokens,
    QuantileBins,
    RankValue,
    Recipe,
    Split,
)

__all__ = [
    "Compiled",
    "ExpressedGenes",
    "MaskTokens",
    "MaskValues",
    "ObsTokens",
    "QuantileBins",
    "RankValue",
    "Recipe",
    "Report",
    "Split",
    "bionemo_geneformer",
    "cellarium_geneformer",
    "compile",
    "encode",
    "geneformer_v1",
    "geneformer_v2",
    "nicheformer",
    "scfoundation",
    "scgpt",
    "scprint",
    "tahoe_x1",
    "transcriptformer",
]
