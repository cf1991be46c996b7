"""The options of a loader, in one object that is checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from hbx_gpu._draws import check_seed
from hbx_gpu._protocols import TensorBatch
from hbx_gpu._storage.choice import check_io
from hbx_gpu.transforms import Transform, chain

if TYPE_CHECKING:
    from hbx_gpu._loading.token_collate import TokenCollate
    from hbx_gpu.images import ImageTransform, TileCollate
    from hbx_gpu.tokens import Compiled, Recipe

Steps: TypeAlias = Transform | Sequence[Transform]
Images: TypeAlias = "ImageTransform | TileCollate"
Tokens: TypeAlias = "Recipe | Compiled | TokenCollate"

RESIDENCIES = ("none", "host", "device", "auto")
"""Accepted values of `residency`, which says where chunks stay between batches."""
LOADS = ("start", "touch")
"""When resident chunks are loaded: all before the first batch, or each when a batch first needs it."""
DECODE = ("auto", "host", "device")
"""Where chunks of general codecs are decoded. ``"auto"``: on the device where a CRC32C of the compressed
bytes is stored and a decompressor exists, otherwise on the host. ``"device"``: on the device, also without a
checksum."""
HOST_BUDGET = 512 << 20
DEVICE_BUDGET = 4 << 30
_DECIDED_BY_SAMPLER = ("batch_size", "shuffle", "drop_last", "batch_sampler")


Graph: TypeAlias = Callable[[TensorBatch], object]
Operators: TypeAlias = Callable[[TensorBatch, Any], TensorBatch]


@dataclass(frozen=True, slots=True)
class DaliOptions:
    """How a loader's pipelines are made; see :func:`cell_pipeline`.

    Attributes
    ----------
    device_id
        The GPU that batches are on; None: the CPU.
    """

    graph: Graph | None = None
    prefetch_queue_depth: int = 2
    num_threads: int | None = None
    seed: int | None = None
    device_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefetch_queue_depth", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class DynamicOptions:
    """How batches are handed over through DALI's dynamic mode; see ``make_loader(operators=...)``.

    Attributes
    ----------
    device_id
        The GPU that batches are on; None: the CPU.
    """

    operators: Operators | None = None
    seed: int | None = None
    device_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """The options of a loader; :func:`hbx_gpu.dataloader.make_loader` describes each of them.

    Attributes
    ----------
    layout, dtype, transform
        Form of the batches; mappings by space for multimodal datasets. `layout` is None if a collate decides.
    measured
        Whether batches of one space say which features were measured.
    images, image_seed
        Transform of images, and the seed of its random steps.
    tokens, padding, pad_to_multiple_of, ids_dtype, token_seed
        Recipe of tokens, and the form in which they are handed out.
    io, residency, residency_budget, residency_load
        How stored bytes are read, and which chunks stay where.
    decode
        Where chunks of general codecs are decoded.
    memory_budget
        Bytes of batches made ahead; None: the default of the device.
    num_workers, threads, window
        Number of worker processes, of threads, and of batches per window. None: decided from sampler and
        machine.
    progress
        Whether a line on the terminal shows the progress of the epoch.
    dali
        How batches go through DALI; None: they do not.
    convert
        Called with each batch before it is handed over, on the consumer's thread.
    rows
        Row numbers that the sampler draws from, int; None: all. A framework that puts another sampler in its
        place gets batches of these rows only.
    torch
        Keywords of ``torch.utils.data.DataLoader``.

    Raises
    ------
    ValueError
        A value is not among the choices or not positive, or a keyword is given that the sampler decides.
    """

    layout: str | Mapping[str, str] | None = None
    dtype: str | Mapping[str, str] = "float32"
    transform: Steps | Mapping[str, Steps] | None = None
    measured: bool = False
    images: Images | Mapping[str, Images] | None = None
    image_seed: int | None = None
    tokens: Tokens | Mapping[str, Tokens] | None = None
    padding: str = "longest"
    pad_to_multiple_of: int | None = None
    ids_dtype: str = "int64"
    token_seed: int | None = None
    io: str | None = None
    residency: str = "none"
    residency_budget: int | None = None
    residency_load: str = "start"
    decode: str = "auto"
    memory_budget: int | None = None
    num_workers: int | None = None
    threads: int | None = None
    window: int | None = None
    progress: bool = False
    dali: DaliOptions | DynamicOptions | None = None
    convert: Callable[[Any], object] | None = None
    rows: np.ndarray | None = field(default=None, compare=False)
    torch: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _names(self.dtype))
        for name, seed in (("token_seed", self.token_seed), ("image_seed", self.image_seed)):
            if seed is not None:
                check_seed(name, seed)
        for name, value, choices in (
            ("decode", self.decode, DECODE),
            ("residency", self.residency, RESIDENCIES),
            ("residency_load", self.residency_load, LOADS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if self.io is not None:
            check_io(self.io)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 batch, got {self.window}")
        for name, budget, least in (
            ("memory_budget", self.memory_budget, 1),
            ("residency_budget", self.residency_budget, 0),
        ):
            if budget is not None and not (isinstance(budget, int | float | np.integer) and budget >= least):
                raise ValueError(f"{name} must be a positive number of bytes, got {budget!r}")
        if wrong := [name for name in _DECIDED_BY_SAMPLER if name in self.torch]:
            raise ValueError(f"{', '.join(wrong)}: the sampler decides this; set it there")

    @classmethod
    def of(cls, **keywords: Any) -> Self:
        """Options from the keywords of ``make_loader``; those that are not ours are torch's."""
        own = {f.name for f in fields(cls) if f.name in keywords} - {"torch", "rows"}
        others = {name: value for name, value in keywords.items() if name not in own}
        return cls(**{name: keywords[name] for name in own}, torch=others)

    @property
    def one_layout(self) -> str:
        """The layout of a dataset of one space.

        Raises
        ------
        ValueError
            The layout is a mapping by space.
        """
        by_space = [s for s in (self.layout, self.dtype, self.transform) if isinstance(s, Mapping)]
        if by_space:
            raise ValueError(f"settings by space are for multimodal datasets; got {by_space[0]!r}")
        assert isinstance(self.layout, str)
        return self.layout

    @property
    def one_dtype(self) -> str:
        """The dtype of a dataset of one space."""
        assert isinstance(self.dtype, str)
        return self.dtype

    @property
    def steps(self) -> Transform:
        """The transform of a dataset of one space, as one step."""
        assert not isinstance(self.transform, Mapping)
        return chain(self.transform)

    @property
    def reads_on_its_own(self) -> bool:
        """Whether chunks are read or kept in another way than the dataset does by itself."""
        return self.io is not None or self.residency != "none"


def _names(dtype: object) -> str | Mapping[str, str]:
    """A dtype by its name, also where one of torch or NumPy is given; of a mapping, that of each space."""
    if isinstance(dtype, str):
        return dtype
    if isinstance(dtype, Mapping):
        return {space: _name(one) for space, one in dtype.items()}
    return _name(dtype)


def _name(dtype: object) -> str:
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    try:
        return np.dtype(dtype).name  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise ValueError(f"dtype must be the name of a dtype, such as 'float32', got {dtype!r}") from None
