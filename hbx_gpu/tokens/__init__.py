"""Model-ready batches: tokens of published single-cell foundation models, made where the rows are.

Recipes say what a model is fed; ``make_loader(layout="tokens", tokens=recipe)`` and :func:`encode` make it.
docs/tokens.md has a page for each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hbx_gpu.tokens._compile import Compiled, Report
from hbx_gpu.tokens._compile import compile_recipe as compile  # noqa: A004
from hbx_gpu.tokens._encode import encode
from hbx_gpu.tokens._presets import (
    bionemo_geneformer,
    cellarium_geneformer,
    cellarium_gpt,
    geneformer_v1,
    geneformer_v2,
    nicheformer,
    scfoundation,
    scgpt,
    scprint,
    state_se,
    tahoe_x1,
    transcriptformer,
    uce,
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
from hbx_gpu.tokens._sampled import GeneSentence, PromptQuery, WeightedSentence

if TYPE_CHECKING:
    from torch import Tensor


def nested(batch: Mapping[str, Tensor], name: str = "input_ids") -> Tensor:
    """One output of a packed batch as a nested tensor of torch (jagged layout), without a copy.

    Parameters
    ----------
    batch
        From a loader with ``padding="packed"``: tensors, ``cu_seqlens`` among them.
    name
        Which output.

    Returns
    -------
    torch.Tensor
        (n_rows, j), with rows of their own lengths.
    """
    import torch

    return torch.nested.nested_tensor_from_jagged(batch[name], batch["cu_seqlens"].to(torch.int64))


__all__ = [
    "Compiled",
    "ExpressedGenes",
    "GeneSentence",
    "MaskTokens",
    "MaskValues",
    "ObsTokens",
    "PromptQuery",
    "QuantileBins",
    "RankValue",
    "Recipe",
    "Report",
    "Split",
    "WeightedSentence",
    "bionemo_geneformer",
    "cellarium_geneformer",
    "cellarium_gpt",
    "compile",
    "encode",
    "geneformer_v1",
    "geneformer_v2",
    "nested",
    "nicheformer",
    "scfoundation",
    "scgpt",
    "scprint",
    "state_se",
    "tahoe_x1",
    "transcriptformer",
    "uce",
]
