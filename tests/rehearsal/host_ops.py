"""torch's own operations on a device, done on the CPU: the memory of the stand-in's devices is the host's.

Every operator that torch has registered for CUDA is replaced, but for those that allocate, view and record,
which need no kernel and stay torch's. A replaced one waits for the current stream and does its work at once,
so it hides races around itself; fills with one repeated byte are ordered on the stream, as on a GPU.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, library
from torch.utils._pytree import tree_map

from tests.rehearsal.runtime import cudart, wait_for

# Operators without a kernel: memory, views, and what torch asks the runtime for.
_NATIVE = frozenset(
    {
        "empty.memory_format",
        "empty_strided",
        "new_empty_strided",
        "as_strided",
        "view",
        "_reshape_alias",
        "unfold",
        "alias",
        "record_stream",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "set_",
        "resize_",
        "is_pinned",
        "_pin_memory",
        "_local_scalar_dense",
        "view_as_real",
        "view_as_complex",
        "is_set_to",
        "lift",
        "_efficientzerotensor",
        "_copy_from",
        "_copy_from_and_resize",
    }
)


def install() -> library.Library:
    """Replace the operators, for as long as what is returned lives."""
    torch.cuda.init()
    replaced = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is wanted
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            space, _, operator = name.partition("::")
            if space != "aten" or operator in _NATIVE:
                continue
            overload = _overload(operator)
            if overload is not None:
                replaced.impl(operator, partial(_on_host, overload), "CUDA", allow_override=True)
        replaced.impl("copy_", _copy, "CUDA", allow_override=True)
        for fill in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            replaced.impl(fill, partial(_fill, fill), "CUDA", allow_override=True)
        replaced.impl("_coalesce", _coalesce, "SparseCUDA", allow_override=True)
    return replaced


_Operator = torch._ops.OpOverload


def _overload(name: str) -> _Operator | None:
    packet, _, overload = name.partition(".")
    found: _Operator | None = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    return found


def _current(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def host_view(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor of the stand-in; does not wait, keeps nothing alive."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    itemsize = tensor.element_size()
    whole = whole[: len(whole) // itemsize * itemsize].view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A new tensor of the stand-in with the numbers of one of the CPU."""
    found = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    host_view(found).copy_(host)
    return found


def _on_host(operator: _Operator, *args: object, **kwargs: object) -> object:
    """Wait for the current stream, do the operation on the CPU, bring new results to the device."""
    views: dict[int, Tensor] = {}  # by the address of the CPU tensor: its tensor of the device
    devices: list[torch.device] = []
    outputs = {argument.name for argument in operator._schema.arguments if argument.is_out}
    fresh: list[tuple[Tensor, Tensor]] = []

    def lower(value: object, output: bool = False) -> object:
        if isinstance(value, torch.device) and value.type == "cuda":
            devices.append(value)
            return torch.device("cpu")
        if not isinstance(value, Tensor) or not value.is_cuda:
            return value
        if not devices or devices[-1] != value.device:
            devices.append(value.device)
            wait_for(_current(value))
        if output:  # the operation sets its size
            host = torch.empty(0, dtype=value.dtype)
            fresh.append((value, host))
        else:
            host = host_view(value)
        views[id(host)] = value
        return host

    host_args = [
        # torch hands a number that it made a tensor of over as a number again.
        torch.tensor(value)
        if isinstance(value, int | float) and str(argument.type) == "Tensor"
        else tree_map(lower, value)
        for value, argument in zip(args, operator._schema.arguments, strict=False)
    ]
    host_kwargs = {
        name: tree_map(partial(lower, output=name in outputs), value) for name, value in kwargs.items()
    }
    results = operator(*host_args, **host_kwargs)
    for value, host in fresh:
        if value.shape != host.shape:
            value.resize_(host.shape)
        host_view(value).copy_(host)

    def raise_(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if id(value) in views:
            return views[id(value)]
        return to_device(value, devices[0])

    return tree_map(raise_, results)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copies that a GPU does without a kernel are torch's own; casts and strided ones happen on the CPU."""
    plain = (
        target.dtype == source.dtype
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
    )
    if plain:
        native: Callable[..., object] = torch.ops.aten.copy_.default._op_dk
        # The kernel is one for all devices, and registered under this key.
        native(torch._C.DispatchKey.CompositeExplicitAutograd, target, source, non_blocking)
        return target
    for tensor in (target, source):
        if tensor.is_cuda:
            wait_for(_current(tensor))
    into, out_of = (host_view(tensor) if tensor.is_cuda else tensor for tensor in (target, source))
    into.copy_(out_of)
    return target


def _coalesce(x: Tensor) -> Tensor:
    """Sort a COO tensor and add up what is at one place."""
    wait_for(_current(x._values()))
    host = torch.sparse_coo_tensor(
        host_view(x._indices()), host_view(x._values()), x.shape, check_invariants=False, is_coalesced=False
    ).coalesce()
    indices, values = to_device(host.indices(), x.device), to_device(host.values(), x.device)
    return torch.sparse_coo_tensor(indices, values, x.shape, check_invariants=False, is_coalesced=True)


def _fill(operator: _Operator, target: Tensor, value: float = 0) -> Tensor:
    pattern = torch.full((1,), value, dtype=target.dtype).view(torch.uint8).tolist()
    if target.is_contiguous() and len(set(pattern)) == 1:
        status = cudart().cudaMemsetAsync(
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_int(pattern[0]),
            ctypes.c_size_t(target.numel() * target.element_size()),
            ctypes.c_void_p(_current(target)),
        )
        assert status == 0
        return target
    more: Sequence[object] = (value,) if operator is not torch.ops.aten.zero_.default else ()
    _on_host(operator, target, *more)
    return target
