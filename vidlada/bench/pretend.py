"""A pretended GPU: what a run would ask of one, counted on a machine that has none.

A tensor on the pretended device wraps a tensor of the CPU, or a meta tensor where only shapes matter, and claims
another device. Every operation is checked by CUDA's rules and counted: kernels, bytes they read and write, arithmetic,
and the places where the host waits. Control flow is the real one, and so are answers where the values are real.

What it cannot tell is how long anything takes; `vidlada.bench.roofline` predicts that from the counts. What a library
launches within an operation, as for sorting, counts as one kernel.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from vidlada.decoding.kv_cache import FEW_QUERIES

PACKAGE = str(Path(__file__).parents[1])
# A build without CUDA can make no tensor there; of the devices it knows, meta is the one that computes nothing.
DEVICE = torch.device("meta")
Place = tuple[str, str]  # what, and the file and line of the package

VIEWS = {
    "view", "_unsafe_view", "slice", "select", "transpose", "t", "expand", "unsqueeze", "squeeze", "permute", "split",
    "split_with_sizes", "as_strided", "detach", "alias", "unbind", "unfold", "diagonal", "_reshape_alias", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "chunk", "unflatten", "narrow", "lift_fresh",
}  # fmt: skip
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
GATHERS = {"index_select", "embedding", "gather", "index"}  # read as much as they write
SCATTERS = {"index_copy_": 3, "index_copy": 3, "index_put_": 2, "scatter_": 3}  # write the tensor at this place
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
# A copy of the whole, and a kernel that writes into it.
COPIES = {"index_fill", "index_copy", "index_put", "index_add", "masked_fill", "scatter", "scatter_add"}
KEY_BLOCK = 256  # keys up to which FlashAttention has nothing to split
HALVES = (torch.bfloat16, torch.float16)  # that it knows


class MixedDevicesError(RuntimeError):
    """An operation that CUDA would refuse."""


@dataclass
class Counts:
    """What was asked of the pretended device.

    Attributes:
        kernels: launches, by operation and place.
        combining: further launches of attention: few queries leave most of a GPU idle unless FlashAttention splits the
            keys, and then a second kernel combines the parts.
        waits: where the host waited for the device.
        uploads: copies to the device that the host did not wait for.
        promotions: operations on different floating-point types, whose result is wider than one of them.
        read_written: bytes that kernels moved in the device's memory, by operation.
        flops: of matrix products, attention and convolutions.
        pinned: address → memory of the host that a GPU may read by itself, kept so that nothing else lies there.
    """

    kernels: Counter[Place] = field(default_factory=Counter)
    combining: Counter[Place] = field(default_factory=Counter)
    waits: Counter[Place] = field(default_factory=Counter)
    uploads: Counter[Place] = field(default_factory=Counter)
    promotions: Counter[Place] = field(default_factory=Counter)
    read_written: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    pinned: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def take(self) -> "Counts":
        """The counts so far, starting anew."""
        taken = replace(self)
        self.__init__(pinned=self.pinned)  # type: ignore[misc]
        return taken

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that a tensor of the host lies in pinned memory."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def upload(self, source: Tensor, non_blocking: bool, what: str) -> None:
        """Count a copy to the device: the host goes on only where the source is pinned."""
        pinned = source.untyped_storage().data_ptr() in self.pinned
        what += "" if pinned or not non_blocking else " from memory that is not pinned"
        (self.uploads if pinned and non_blocking else self.waits)[place(what)] += 1


def place(what: str) -> Place:
    """With the innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and name != __file__:
            return what, f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return what, "elsewhere"


class DeviceTensor(torch.Tensor):
    """A tensor that claims to be on the pretended device."""

    contents: Tensor
    counts: Counts

    @staticmethod
    def __new__(cls, contents: Tensor, counts: Counts) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, contents.size(), strides=contents.stride(), storage_offset=contents.storage_offset(),
            dtype=contents.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, contents: Tensor, counts: Counts):
        self.contents, self.counts = contents, counts

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.contents})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        counts = next(leaf.counts for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, DeviceTensor))
        with torch._C.DisableTorchFunction():  # what happens in here is the CPU's
            return run(func, args, kwargs or {}, counts)


def unwrap(value: Any) -> Any:
    """The tensor inside."""
    return value.contents if isinstance(value, DeviceTensor) else value


def shape_only(*shape: int, dtype: torch.dtype, counts: Counts) -> DeviceTensor:
    """A tensor without values, whatever its size."""
    with torch._C.DisableTorchFunction():
        return DeviceTensor(torch.empty(shape, dtype=dtype, device="meta"), counts)


def as_shape(value: Any) -> Any:
    """A meta tensor of the same shape, for a tensor of the device."""
    return value.contents.to("meta") if isinstance(value, DeviceTensor) else value


def on_device(device: Any) -> bool:
    """Whether a device is the pretended one."""
    return device is not None and torch.device(device).type == DEVICE.type


def on_host(tensor: Tensor) -> Tensor:
    """A copy of the values; where there are none (meta), zeros."""
    if tensor.device.type == "meta":
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.clone()


def run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counts) -> Any:
    """Check and count an operation that has tensors of the pretended device, then compute it."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    result_there = on_device(kwargs["device"]) if kwargs.get("device") is not None else True
    inner_kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if name == "_to_copy" and not result_there:
        counts.waits[place("copy to the host")] += 1
        return on_host(args[0].contents).to(kwargs.get("dtype") or args[0].dtype)
    if name == "copy_" and len({isinstance(tensor, DeviceTensor) for tensor in args[:2]}) == 2:
        return _copy_between(args[0], args[1], bool(kwargs.get("non_blocking", len(args) > 2 and args[2])), counts)
    _check_devices(name, func, args, tensors, counts)
    if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        counts.waits[place(name)] += 1
        if name == "_local_scalar_dense" and args[0].contents.device.type == "meta":
            return 0
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dim()}
    if len(kinds) > 1 and name not in ("copy_", "_to_copy"):
        counts.promotions[place(f"{name} of {', '.join(sorted(map(str, kinds)))}")] += 1
    # a meta tensor among them: only shapes count
    shapes = any(unwrap(tensor).device.type == "meta" for tensor in tensors if isinstance(tensor, DeviceTensor))
    inside = as_shape if shapes else unwrap
    inner_args, inner_kwargs = tree_map(inside, args), tree_map(inside, inner_kwargs)
    result = func(*inner_args, **inner_kwargs)
    if name not in VIEWS:
        counts.kernels[place(name)] += 2 if name in COPIES else 1
        counts.read_written[name] += moved_bytes(name, args, kwargs, result)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            counts.flops += formula(*inner_args, **inner_kwargs, out_val=result)
    return _wrapped_result(func, args, kwargs, result, counts)


def _wrapped_result(func: Any, args: Any, kwargs: dict[str, Any], result: Any, counts: Counts) -> Any:
    returns = func._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        return kwargs.get("out", args[0])
    return tree_map(lambda value: DeviceTensor(value, counts) if isinstance(value, Tensor) else value, result)


def _copy_between(target: Tensor, source: Tensor, non_blocking: bool, counts: Counts) -> Tensor:
    """`copy_` between host and device."""
    if isinstance(target, DeviceTensor):
        counts.upload(source, non_blocking, "copy_ to the device")
        contents = unwrap(target)
        if contents.device.type != "meta":
            contents.copy_(source)
        return target
    counts.waits[place("copy_")] += 1
    return target.copy_(on_host(unwrap(source)))


def _check_devices(name: str, func: Any, args: Any, tensors: list[Tensor], counts: Counts) -> None:
    """CUDA's rules: tensors of both sides do not mix, but for host numbers, and host indices, which are copied."""
    host = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        filled = name.startswith("index_put") and args[2].numel() == 1
        if any(index.dtype == torch.bool for index in indices) and not filled:
            counts.waits[place(f"{name} by a mask")] += 1
        for index in indices:
            if not isinstance(index, DeviceTensor):
                counts.waits[place(f"{name}: indices are copied to the device")] += 1
        host = [tensor for tensor in host if all(tensor is not index for index in indices)]
        if not isinstance(args[0], DeviceTensor):
            raise MixedDevicesError(f"{func}: a CPU tensor is indexed by one of the device, at {place('')[1]}")
    if host:
        shapes = ", ".join(f"{tuple(tensor.shape)}" for tensor in host)
        raise MixedDevicesError(f"{func}: tensors on the CPU, {shapes}, with others on the device, at {place('')[1]}")


def moved_bytes(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes an operation reads and writes; gathers and scatters touch only what they move."""
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if name in GATHERS:
        return 2 * sum(tensor.nbytes for tensor in results)
    if name in SCATTERS:
        source = args[SCATTERS[name]]
        moved = 2 * source.nbytes if isinstance(source, Tensor) else 0
        return moved + (2 * args[0].nbytes if name in COPIES else 0)
    if name == "copy_":
        return 2 * args[0].nbytes
    given = {key: value for key, value in kwargs.items() if key != "out"}  # that is written only
    read = {id(leaf): leaf.nbytes for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)}
    return sum(read.values()) + sum(tensor.nbytes for tensor in results)


class PretendedDevice(TorchFunctionMode):
    """Functions that make tensors, move them, or are one kernel on a GPU though several operations on a CPU."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = FUNCTIONS.get(func)
        if special is not None:
            return special(self.counts, func, args, kwargs)
        return func(*args, **kwargs)


def _factory(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not on_device(kwargs.get("device")):
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return counts.pin(made) if pinned else made
    generator = kwargs.get("generator")
    if generator is not None:
        raise MixedDevicesError(f"{func.__name__}: a generator on {generator.device}, at {place('')[1]}")
    made = func(*args, **{**kwargs, "device": "cpu"})
    if func in (torch.tensor, torch.as_tensor):
        counts.waits[place("tensor of host data")] += 1
    elif func not in (torch.empty, torch.empty_like):
        counts.kernels[place(func.__name__)] += 1
        counts.read_written[func.__name__] += made.nbytes
    return DeviceTensor(made, counts)


def _to(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    rest = (*args[1:], *kwargs.values())
    target = next((value for value in rest if isinstance(value, str | torch.device)), None)
    like = next((value for value in rest if isinstance(value, Tensor)), None)
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if like is not None:
        target, dtype = like.device, like.dtype
    up, there = on_device(target), isinstance(source, DeviceTensor)
    if target is None or up == there:
        copy = source.clone() if kwargs.get("copy") else source
        return copy if dtype in (None, source.dtype) else func(copy, dtype)
    if there:
        counts.waits[place("copy to the host")] += 1
        moved = on_host(source.contents)
        return moved if dtype is None else moved.to(dtype)
    counts.upload(source, bool(kwargs.get("non_blocking")), "copy to the device")
    moved = DeviceTensor(source.clone(), counts)
    return moved if dtype in (None, source.dtype) else moved.to(dtype)


def _pin_memory(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return counts.pin(args[0].clone())


def _new_tensor(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], DeviceTensor):
        return func(*args, **kwargs)
    counts.waits[place("new_tensor of host data")] += 1
    return DeviceTensor(torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype), counts)


def _to_host(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], DeviceTensor):
        return func(*args, **kwargs)
    counts.waits[place(func.__name__)] += 1
    values = on_host(args[0].contents)
    return values if func is Tensor.cpu else func(values)


def _where(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A kernel makes a tensor of a number."""
    if not isinstance(args[0], DeviceTensor) or len(args) < 3:
        return func(*args, **kwargs)
    options = {"dtype": torch.result_type(*args[1:]), "device": DEVICE}
    filled = [
        value if isinstance(value, Tensor) else _factory(counts, torch.full, ((), value), options) for value in args[1:]
    ]
    return func(args[0], *filled, **kwargs)


def _one_kernel(counts: Counts, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One kernel on a GPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(isinstance(tensor, DeviceTensor) for tensor in tensors):
        return func(*args, **kwargs)
    if not all(isinstance(tensor, DeviceTensor) for tensor in tensors):
        raise MixedDevicesError(f"{func.__name__}: tensors on both sides, at {place('')[1]}")
    if len({tensor.dtype for tensor in tensors if tensor.is_floating_point()}) > 1:
        counts.promotions[place(func.__name__)] += 1
    inside = as_shape if any(unwrap(tensor).device.type == "meta" for tensor in tensors) else unwrap
    result = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    what = func.__name__
    if func is F.scaled_dot_product_attention:
        queries, keys = args[0], args[1]
        result = result.transpose(1, 2).contiguous().transpose(1, 2)  # as the flash kernels lay it out
        counts.flops += 4 * queries.numel() * keys.shape[-2]
        if kwargs.get("attn_mask") is not None:
            what += " with a mask"
        elif queries.shape[-2] <= FEW_QUERIES and keys.shape[-2] > KEY_BLOCK and queries.dtype in HALVES:
            counts.combining[place(what)] += 1
    counts.kernels[place(what)] += 1
    counts.read_written[what] += sum(tensor.nbytes for tensor in (*tensors, result))
    return DeviceTensor(result, counts)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange,
                     torch.linspace, torch.rand, torch.randn, torch.empty_like, torch.eye), _factory),
    **dict.fromkeys((Tensor.to, Tensor.cuda), _to),
    **dict.fromkeys((Tensor.cpu, Tensor.tolist, Tensor.numpy), _to_host),
    **dict.fromkeys((torch.where, Tensor.where), _where),
    **dict.fromkeys((F.scaled_dot_product_attention, torch.rms_norm, F.rms_norm), _one_kernel),
    Tensor.new_tensor: _new_tensor,
    Tensor.pin_memory: _pin_memory,
}  # fmt: skip


def move(module: nn.Module, counts: Counts) -> None:
    """Parameters and buffers onto the pretended device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                wrapped = DeviceTensor(parameter.detach(), counts)
                part._parameters[name] = nn.Parameter(wrapped, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer, counts)


@contextmanager
def pretended_device() -> Iterator[Counts]:
    """Within it, tensors made on `DEVICE` and modules that were moved count as a GPU's."""
    counts, autocast = Counts(), torch.is_autocast_enabled

    def no_autocast(kind: str | None = None) -> bool:
        return kind != DEVICE.type and (autocast() if kind is None else autocast(kind))

    def enter(self: Any) -> None:  # wrappers cannot be views of inference tensors
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()

    def leave(self: Any, *error: Any) -> None:
        self._no_grad.__exit__(*error)

    with (
        mock.patch.object(torch, "is_autocast_enabled", no_autocast),
        mock.patch.object(torch.inference_mode, "__enter__", enter),
        mock.patch.object(torch.inference_mode, "__exit__", leave),
        PretendedDevice(counts),
    ):
        yield counts
