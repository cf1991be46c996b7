"""A data module for models of scvi-tools, by the interface of its custom data loaders.

A model is made from ``data.registry`` and trained with ``model.train(datamodule=data)``, without AnnData.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._protocols import TensorBatch
from hbx_gpu._source import GroupRuns
from hbx_gpu.dataloader import make_loader
from hbx_gpu.integrations._install import not_installed
from hbx_gpu.integrations.lightning import CellDataModule, Cells, codes_of
from hbx_gpu.sampler import CellSampler, split_rows

try:
    import scvi
    import torch
except ImportError as error:
    raise not_installed("scvi", error) from error

__all__ = ["ScviDataModule", "load_query_data"]

_Batch = dict[str, torch.Tensor]
Registry: TypeAlias = dict[str, Any]
"""What a model of scvi-tools knows of its data, in the form in which it is saved."""


class Features(Cells, Protocol):
    """Cells of one feature space."""

    @property
    def feature_uids(self) -> np.ndarray | None:
        """Names of the features, object (n_features,)."""


class ScviDataModule(CellDataModule):
    """Cells of a dataset for ``scvi.model.SCVI``, ``SCANVI`` and other models that take a data module.

    Parameters
    ----------
    dataset
        Dataset of counts of one feature space, with the metadata columns that are named here.
    batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys, size_factor_key
        Columns of the dataset, as for ``SCVI.setup_anndata``.
    unlabeled_category
        Label of cells whose type is not known, for SCANVI. Cells without a value get it too.
    model_name
        Name of the model class, which ``load`` compares.
    reference
        The data module or registry of a trained model, for query data: its categories keep their codes, and
        new batches follow them. The dataset needs the same features in the same order.
    batch_size
        Cells of a batch.
    **options
        Splits and options of :class:`~hbx_gpu.integrations.lightning.CellDataModule`.

    Raises
    ------
    ValueError
        A column is missing or has cells without a value, or features or categories differ from the reference.

    Notes
    -----
    With unlabeled cells, the classifier of SCANVI learns from the labeled cells of each batch. The loader of
    scvi-tools for AnnData draws a second batch of labeled cells instead.
    """

    def __init__(
        self,
        dataset: Features,
        *,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        size_factor_key: str | None = None,
        model_name: str = "SCVI",
        reference: ScviDataModule | Registry | None = None,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, **options)
        self._decided = options.get("split_by") is not None or options.get("fractions") is not None
        self.model_name = model_name
        self.unlabeled_category = unlabeled_category
        self.device = torch.device("cpu")
        self._keys = {
            "batch_key": batch_key,
            "labels_key": labels_key,
            "size_factor_key": size_factor_key,
            "categorical_covariate_keys": _listed(categorical_covariate_keys),
            "continuous_covariate_keys": _listed(continuous_covariate_keys),
        }
        known = reference.registry if isinstance(reference, ScviDataModule) else reference
        fields = None if known is None else known["field_registries"]
        self.var_names = np.asarray(dataset.feature_uids, dtype=object)
        if fields is not None:
            _check_features(self.var_names, np.asarray(fields["X"]["state_registry"]["column_names"], object))

        n = len(dataset)
        self._batch, self.batch_labels = np.zeros(n, np.int32), np.array([0], dtype=object)
        if batch_key is not None:
            before = None if fields is None else fields["batch"]["state_registry"]["categorical_mapping"]
            self._batch, self.batch_labels = _encoded(dataset, batch_key, before, new="may follow")
        self._labels, self.labels = np.zeros(n, np.int32), np.array([0], dtype=object)
        if labels_key is not None:
            before = None if fields is None else fields["labels"]["state_registry"]["categorical_mapping"]
            self._labels, self.labels = _encoded(dataset, labels_key, before, missing=unlabeled_category)
        self._categorical: list[np.ndarray] = []
        self._mapping: dict[str, np.ndarray] = {}
        for key in categorical_covariate_keys or ():
            before = (
                None if fields is None else fields["extra_categorical_covs"]["state_registry"]["mapping"][key]
            )
            codes, self._mapping[key] = _encoded(dataset, key, before)
            self._categorical.append(codes)
        self._continuous = [_numbers(dataset, key) for key in continuous_covariate_keys or ()]
        self._size_factor = None if size_factor_key is None else _numbers(dataset, size_factor_key)

    @property
    def n_obs(self) -> int:
        """Number of cells of the dataset, of all splits."""
        return len(self.dataset)

    @property
    def n_vars(self) -> int:
        """Number of features."""
        return len(self.var_names)

    @property
    def n_batch(self) -> int:
        """Number of batches in the sense of `batch_key`."""
        return len(self.batch_labels)

    @property
    def n_labels(self) -> int:
        """Number of labels, with the unlabeled category if there are unlabeled cells."""
        return len(self.labels)

    @property
    def label_keys(self) -> np.ndarray:
        """The labels; scvi-tools saves them with the model under this name."""
        return self.labels

    @property
    def n_samples(self) -> int:
        """Number of samples in the sense of scvi-tools, which this module does not have."""
        return 0

    @property
    def labels_(self) -> np.ndarray:
        """Label of each cell, object (n_obs,)."""
        found: np.ndarray = self.labels[self._labels]
        return found

    @property
    def n_continuous_cov(self) -> int:
        """Number of continuous covariates."""
        return len(self._continuous)

    @property
    def n_cats_per_cov(self) -> list[int] | None:
        """Number of categories of each categorical covariate; None if there are none."""
        return [len(values) for values in self._mapping.values()] or None

    @property
    def train_idx(self) -> np.ndarray:
        """int64 row numbers of the training split."""
        return self.rows["train"]

    @property
    def val_idx(self) -> np.ndarray:
        """int64 row numbers of the validation split."""
        return self.rows["val"]

    @property
    def test_idx(self) -> np.ndarray:
        """int64 row numbers of the test split."""
        return self.rows["test"]

    @property
    def n_train(self) -> int:
        """Number of training cells."""
        return len(self.train_idx)

    @property
    def n_val(self) -> int:
        """Number of validation cells."""
        return len(self.val_idx)

    def set_split(
        self,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
    ) -> None:
        """Split at random by the arguments of ``model.train``; a split that this module was made with stays.

        scvi-tools calls this from release 1.5 on.

        Parameters
        ----------
        train_size, validation_size
            Shares of the cells; what is left is the test split.
        shuffle_set_split
            False: validation cells are the first ones of the dataset, training cells follow, then test cells.
        batch_size
            As for :meth:`set_batch_size`.
        """
        self.set_batch_size(batch_size)
        if self._decided or (train_size is None and validation_size is None):
            return
        train = 1.0 - (validation_size or 0.0) if train_size is None else float(train_size)
        val = max(0.0, 1.0 - train) if validation_size is None else float(validation_size)
        shares = {"train": train, "val": val, "test": max(0.0, 1.0 - train - val)}
        shares = {name: share for name, share in shares.items() if share > 1e-9}
        if shuffle_set_split:
            found = split_rows(self.n_obs, shares)
        else:
            order = [name for name in ("val", "train", "test") if name in shares]
            ends = np.rint(np.cumsum([shares[name] for name in order]) * self.n_obs).astype(np.int64)
            found = dict(zip(order, np.split(np.arange(self.n_obs), ends[:-1]), strict=True))
        self.rows = {name: found.get(name, np.empty(0, np.int64)) for name in self.rows}

    def set_batch_size(self, batch_size: int | None = None) -> None:
        """Set the number of cells of a batch; None changes nothing."""
        if batch_size is not None:
            self.batch_size = batch_size

    @property
    def registry(self) -> Registry:
        """What a model of scvi-tools has to know of the data."""
        categorical: Registry = {}
        if self._mapping:
            categorical = {
                "field_keys": list(self._mapping),
                "mapping": self._mapping,
                "n_cats_per_key": self.n_cats_per_cov,
            }
        keys = self._keys["continuous_covariate_keys"]
        return {
            "scvi_version": scvi.__version__,
            "model_name": self.model_name,
            "setup_args": {"layer": None, "samples_key": None, **self._keys},
            "field_registries": {
                "X": {
                    "data_registry": {"attr_name": "X", "attr_key": None},
                    "state_registry": {
                        "n_obs": self.n_obs,
                        "n_vars": self.n_vars,
                        "column_names": self.var_names,
                    },
                    "summary_stats": {"n_vars": self.n_vars, "n_cells": self.n_obs},
                },
                "batch": {
                    "data_registry": {"attr_name": "obs", "attr_key": "_scvi_batch"},
                    "state_registry": {
                        "categorical_mapping": self.batch_labels,
                        "original_key": self._keys["batch_key"],
                    },
                    "summary_stats": {"n_batch": self.n_batch},
                },
                "labels": {
                    "data_registry": {"attr_name": "obs", "attr_key": "_scvi_labels"},
                    "state_registry": {
                        "categorical_mapping": self.labels,
                        "original_key": self._keys["labels_key"],
                        "unlabeled_category": self.unlabeled_category,
                    },
                    "summary_stats": {"n_labels": self.n_labels},
                },
                "ind_x": {
                    "data_registry": {"attr_name": "obs", "attr_key": "_indices"},
                    "state_registry": {},
                    "summary_stats": {},
                },
                "size_factor": {"data_registry": {}, "state_registry": {}, "summary_stats": {}},
                "extra_categorical_covs": {
                    "data_registry": {"attr_name": "obsm", "attr_key": "_scvi_extra_categorical_covs"}
                    if categorical
                    else {},
                    "state_registry": categorical,
                    "summary_stats": {"n_extra_categorical_covs": len(self._mapping)},
                },
                "extra_continuous_covs": {
                    "data_registry": {"attr_name": "obsm", "attr_key": "_scvi_extra_continuous_covs"}
                    if keys
                    else {},
                    "state_registry": {"columns": np.array(keys, dtype=object)} if keys else {},
                    "summary_stats": {"n_extra_continuous_covs": self.n_continuous_cov},
                },
            },
            "setup_method_name": "setup_datamodule",
        }

    def tensors(self, batch: TensorBatch) -> _Batch:
        """Return the tensors that scvi-tools wants for a batch of this module's loaders.

        Parameters
        ----------
        batch
            With ``X`` (n, n_vars) and ``index`` (n,).

        Returns
        -------
        dict
            ``X`` float32 (n, n_vars); ``batch``, ``labels`` and ``ind_x``, int64 (n, 1); and as far as there
            are any, ``extra_categorical_covs`` int64 (n, k), ``extra_continuous_covs`` float32 (n, k) and
            ``size_factor`` float32 (n, 1).
        """
        x = batch["X"]
        rows = batch["index"].cpu().numpy()

        def column(values: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
            taken = np.stack([part[rows] for part in values], axis=1)
            return torch.from_numpy(taken).to(device=x.device, dtype=dtype)

        found: _Batch = {
            "X": x.float(),
            "batch": column([self._batch], torch.int64),
            "labels": column([self._labels], torch.int64),
        }
        if self._categorical:
            found["extra_categorical_covs"] = column(self._categorical, torch.int64)
        if self._continuous:
            found["extra_continuous_covs"] = column(self._continuous, torch.float32)
        if self._size_factor is not None:
            found["size_factor"] = column([self._size_factor], torch.float32)
        found["ind_x"] = batch["index"].to(x.device)[:, None]
        return found

    def on_before_batch_transfer(
        self,
        batch: TensorBatch,
        dataloader_idx: int,  # noqa: ARG002 - by the interface of Lightning
    ) -> _Batch | tuple[_Batch, _Batch]:
        """Return the tensors of a batch, and for SCANVI those of its labeled cells beside them."""
        found = self.tensors(batch)
        if self.model_name != "SCANVI" or self._keys["labels_key"] is None:
            return found
        labeled = self.labels[found["labels"][:, 0].cpu().numpy()] != self.unlabeled_category
        if labeled.sum() < 2:  # batch normalization needs two cells
            return found
        keep = torch.from_numpy(np.flatnonzero(labeled)).to(found["X"].device)
        return found, {name: values[keep] for name, values in found.items()}

    def inference_dataloader(
        self, batch_size: int | None = None, indices: np.ndarray | None = None, **options: Any
    ) -> _InOrder:
        """Return batches in dataset order, for ``model.get_latent_representation(dataloader=...)``.

        Parameters
        ----------
        batch_size
            Cells of a batch; None: 4,096.
        indices
            Row numbers; None: all rows. Batches come in their ascending order.
        **options
            Options of :func:`hbx_gpu.dataloader.make_loader` instead of those of this module.
        """
        order = CellSampler(GroupRuns.one(len(self.dataset)), batch_size or 4096, shuffle=False, rows=indices)
        return _InOrder(make_loader(self.dataset, order, **(self._options | options)), self)


class _InOrder:
    """The tensors of a loader's batches; it can be iterated again and again."""

    def __init__(self, loader: CellLoader, data: ScviDataModule) -> None:
        self._loader, self._data = loader, data

    def __iter__(self) -> Iterator[_Batch]:
        return (self._data.tensors(batch) for batch in self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def load_query_data(
    model_class: type[Any], reference: str | os.PathLike[str] | object, data: ScviDataModule, **freeze: bool
) -> Any:
    """Return a model for query data with the weights of a reference model, by architectural surgery.

    Where the reference was trained with a data module, ``model_class.load_query_data`` of scvi-tools makes a
    module of the reference's number of batches, so it takes no new ones. Columns of weights for new batches
    are put beside those of the batches that the reference knows, before those of categorical covariates.

    Parameters
    ----------
    model_class
        ``scvi.model.SCVI`` or ``SCANVI``.
    reference
        Folder of a saved model, or the model.
    data
        Query data, made with ``reference=`` the data module of the reference model.
    **freeze
        ``unfrozen``, ``freeze_expression`` and the other options of ``load_query_data``, with its defaults.

    Returns
    -------
    scvi.model.base.BaseModelClass
        A model to train with ``model.train(datamodule=data, plan_kwargs={"weight_decay": 0.0})``.
    """
    from scvi.model.base._archesmixin import _set_params_online_update

    loaded = reference
    if isinstance(reference, str | os.PathLike):
        loaded = model_class.load(os.fspath(reference), adata=False, accelerator="cpu")
    assert isinstance(loaded, scvi.model.base.BaseModelClass)
    given = loaded.init_params_
    options = {name: value for part in given["kwargs"].values() for name, value in part.items()}
    options |= {name: v for name, v in given["non_kwargs"].items() if name not in _NOT_FOR_QUERY}
    if "datamodule" in given["non_kwargs"]:
        options["datamodule"] = data
    model = model_class(registry=data.registry, **options)
    weights, wanted = loaded.module.state_dict(), model.module.state_dict()
    # scvi-tools makes no columns for a covariate of one category.
    covariates = sum(n for n in data.n_cats_per_cov or () if n > 1)
    for name, new in wanted.items():
        # Columns of a layer: its inputs, then the batches, then the categories of each covariate.
        n_last = covariates if ".fc_layers." in name else 0
        wanted[name] = _grown(weights[name].to(new.device), new, n_last)
    model.module.load_state_dict(wanted)
    model.module.eval()
    _set_params_online_update(model.module, **(_FREEZE | freeze))
    model.is_trained_ = False
    return model


def _grown(old: torch.Tensor, new: torch.Tensor, n_last: int) -> torch.Tensor:
    """Return `old` in the shape of `new`: what is new keeps its initial weights.

    Parameters
    ----------
    old, new
        Weights of the reference, and initial weights of the model that is to be made.
    n_last
        Columns of a matrix that stay the last ones; new ones come before them.
    """
    for axis in range(new.ndim):
        if (more := new.shape[axis] - old.shape[axis]) <= 0:
            continue
        at = old.shape[axis] - (n_last if axis == 1 else 0)
        part = new.narrow(axis, at, more)
        for other in range(axis + 1, new.ndim):
            part = part.narrow(other, 0, old.shape[other])
        first, last = old.split([at, old.shape[axis] - at], dim=axis)
        old = torch.cat([first, part, last], dim=axis)
    return old


_NOT_FOR_QUERY = ("adata", "registry", "datamodule")
_FREEZE = {
    "unfrozen": False,
    "freeze_decoder_first_layer": True,
    "freeze_batchnorm_encoder": True,
    "freeze_batchnorm_decoder": False,
    "freeze_dropout": False,
    "freeze_expression": True,
    "freeze_classifier": True,
}


def _listed(keys: Sequence[str] | None) -> list[str] | None:
    return None if keys is None else list(keys)


def _check_features(here: np.ndarray, reference: np.ndarray) -> None:
    if len(here) == len(reference) and (here == reference).all():
        return
    raise ValueError(
        f"the dataset has {len(here)} features and the reference {len(reference)}, or in another order: make "
        "the dataset with the features of the reference, query.features(list(reference.var_names))"
    )


def _encoded(
    dataset: Cells, column: str, before: object, *, missing: str | None = None, new: str = "refused"
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 (n_rows,) of a column, and what they mean: sorted, `missing` last, as scvi-tools has it.

    Parameters
    ----------
    before
        Categories of a reference, which keep their codes; None: there is no reference.
    missing
        Value that stands for cells without one; None: these are an error.
    new
        What happens to categories that the reference lacks.
    """
    codes = codes_of(dataset, column)
    values = dataset.categories.get(column)
    if values is None:
        values = np.unique(np.asarray(dataset.columns[column]))
    names = np.asarray(values, dtype=object)
    if missing is None and (codes < 0).any():
        raise ValueError(
            f"{np.count_nonzero(codes < 0):,} cells have no value in the column {column!r}: leave them out "
            f"with where({column + ' IS NOT NULL'!r})"
        )
    occurring = names[np.unique(codes[codes >= 0])].tolist()
    found = sorted({name for name in occurring if name != missing})
    if before is not None:
        known = np.asarray(before, dtype=object).reshape(-1).tolist()
        strangers = [name for name in found if name not in known]
        if strangers and new == "refused":
            raise ValueError(f"the column {column!r} has {strangers[:5]}, which the reference does not have")
        found = known + strangers
    elif missing is not None and (missing in occurring or (codes < 0).any()):
        found.append(missing)
    place = {name: code for code, name in enumerate(found)}
    table = np.array([place.get(name, -1) for name in names.tolist()] + [place.get(missing, -1)], np.int32)
    mapped = table[codes]  # a code of -1 takes the last entry
    if (mapped < 0).any():
        raise ValueError(
            f"cells have the label {missing!r} in {column!r}, and the reference has no such cells"
        )
    return mapped, np.array(found, dtype=object)


def _numbers(dataset: Cells, column: str) -> np.ndarray:
    codes_of(dataset, column)  # says what is wrong if there is no such column
    values = np.asarray(dataset.columns[column])
    if column in dataset.categories or values.dtype.kind not in "iuf":
        raise ValueError(f"the column {column!r} does not hold numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"the column {column!r} has values that are missing or infinite")
    return values.astype(np.float32)
