"""The layout ``"tokens"``: recipes met with a dataset, and the collate that makes tokens of its batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.multimodal import MultimodalCellDataset
from hbx_gpu._loading.sampler_attributes import seed_of
from hbx_gpu._loading.token_collate import TokenCollate
from hbx_gpu._protocols import Loadable
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens import Compiled, Recipe, compile  # noqa: A004
from hbx_gpu.tokens._measured import Measured, needs_measured

if TYPE_CHECKING:
    from hbx_gpu._loading.options import LoaderOptions

_LOG = logging.getLogger(__name__)
_SETTINGS = ("tokens", "padding", "pad_to_multiple_of", "ids_dtype", "token_seed")


def with_token_collates(dataset: Loadable[object], sampler: object, options: LoaderOptions) -> LoaderOptions:
    """Options with collates in the place of recipes.

    Raises
    ------
    ValueError
        Recipes without ``layout="tokens"`` or the other way round; a dataset that has no counts.
    """
    spaces = options.layout.values() if isinstance(options.layout, Mapping) else [options.layout]
    if "tokens" not in spaces:
        for name in _SETTINGS:
            if getattr(options, name) not in (None, "longest", "int64"):
                raise ValueError(f'{name}= belongs to layout="tokens", and the layout is {options.layout!r}')
        return options
    if options.tokens is None:
        raise ValueError(
            'layout="tokens" needs tokens=, a recipe such as hbx_gpu.tokens.geneformer_v2(vocabulary, '
            "medians)"
        )
    if isinstance(dataset, MultimodalCellDataset):
        return replace(options, tokens=_by_space(dataset, sampler, options))
    if isinstance(options.tokens, Mapping):
        raise ValueError("recipes by space are for multimodal datasets; give this one a recipe")
    return replace(options, tokens=_collate(dataset, options.tokens, sampler, options))


def _by_space(
    dataset: MultimodalCellDataset, sampler: object, options: LoaderOptions
) -> dict[str, TokenCollate]:
    """Collates of the spaces whose layout is tokens."""
    sparse = [name for name, part in dataset.datasets.items() if isinstance(part, CellDataset)]
    layout = options.layout
    wanted = [
        n for n in sparse if layout == "tokens" or (isinstance(layout, Mapping) and layout.get(n) == "tokens")
    ]
    given = options.tokens
    if not isinstance(given, Mapping):
        if len(wanted) != 1:
            raise ValueError(f"name the space of the recipe, of {wanted}: tokens={{space: recipe}}")
        assert given is not None
        given = {wanted[0]: given}
    if set(given) != set(wanted):
        raise ValueError(f"tokens= has recipes for {sorted(given)}; spaces whose layout is tokens: {wanted}")
    return {
        name: _collate(dataset.datasets[name], recipe, sampler, options, dataset.categories)
        for name, recipe in given.items()
    }


def _collate(
    dataset: object,
    recipe: object,
    sampler: object,
    options: LoaderOptions,
    categories: Mapping[str, np.ndarray] | None = None,
) -> TokenCollate:
    if isinstance(recipe, TokenCollate):
        return recipe
    if not isinstance(dataset, CellDataset):
        raise ValueError(
            f'layout="tokens" is for sparse counts with feature uids, and this is a {type(dataset).__name__}'
        )
    if isinstance(recipe, Compiled):
        recipe.check_features(dataset.feature_uids)
        compiled = recipe
    elif isinstance(recipe, Recipe):
        compiled = compile(recipe, dataset.feature_uids)
    else:
        raise ValueError(
            f"tokens= must be a recipe of hbx_gpu.tokens, such as tokens.geneformer_v2(...), got {recipe!r}"
        )
    known = dataset.categories if categories is None else categories
    if missing := [name for name in compiled.recipe.obs_columns if name not in dataset.columns]:
        raise InvalidDataError(
            f"the recipe reads obs columns {missing}, which the dataset was not opened with: name them in "
            "metadata_columns"
        )
    _LOG.info("hbx_gpu tokens of %s: %s", dataset.feature_space, compiled.report)
    seed = options.token_seed
    if seed is None:
        seed = seed_of(sampler)
    return TokenCollate(
        compiled,
        categories=known,
        seed=seed,
        where=f"layer {dataset.layer!r} of {dataset.feature_space!r}",
        padding=options.padding,
        pad_to_multiple_of=options.pad_to_multiple_of,
        ids_dtype=options.ids_dtype,
        measured=_measured(dataset) if needs_measured(compiled) else None,
    )


def _measured(dataset: CellDataset) -> Measured:
    """Which features were measured in each row; the last mask is that of rows without a stored matrix."""
    masks = dataset.measured_masks(np.array([*range(dataset.n_groups), -1]))
    return Measured(masks, dataset.groups_np)
