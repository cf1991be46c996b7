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
    import numpy as np
    from torch import Tensor


def nested(batch: Mapping[str, Tensor | np.ndarray], name: str = "input_ids") -> Tensor:
    """One output of a packed batch as a nested tensor of torch (jagged layout), without a copy.

    Parameters
    ----------
    batch
        From a loader, or from :func:`encode`, with ``padding="packed"``: ``cu_seqlens`` is among its entries.
    name
        Which output, by the name that it has in `batch`.

    Returns
    -------
    torch.Tensor
        (n_rows, j), with rows of their own lengths.

    Raises
    ------
    ValueError
        The batch is padded, or has no entry `name`.
    """
    import torch

    if "cu_seqlens" not in batch:
        raise ValueError('nested tensors are made of packed batches: ask for padding="packed"')
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}; it has {', '.join(sorted(batch))}")
    bounds = torch.as_tensor(batch["cu_seqlens"])
    return torch.nested.nested_tensor_from_jagged(torch.as_tensor(batch[name]), bounds.to(torch.int64))


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
