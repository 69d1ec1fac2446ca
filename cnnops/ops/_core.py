"""What every operator is made of: registration with torch, and the choice of the way a call takes.

An operator ``cnnops::X`` is declared once, as an :class:`Operator`: its schema, the kernel call, the shape function and
the formulas for its derivative and for vmap. ``Operator.__call__`` then takes the cheapest way that is right:

* plain CPU tensors, no gradient: the extension's own function for it, where there is one, in one call;
* plain CPU or CUDA tensors, no gradient: the kernel, without torch's dispatcher (a conv2d call through it costs 3 µs
  more);
* plain CPU or CUDA tensors, a gradient: the same inside a ``torch.autograd.Function``;
* under functorch's transforms: a ``torch.autograd.Function`` of the style they ask for, with a vmap rule;
* anything else (compiling, exporting, dispatch modes, tensor subclasses, meta tensors): ``torch.ops.cnnops.X``, which
  has fake, autograd, vmap and flop rules registered.

Forward-mode AD never reaches an operator (``register_autograd`` would silently return zero tangents): the functions of
:mod:`cnnops.functional` ask :func:`needs_composite` first and then compute with PyTorch's own differentiable ops.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from .._lib import C

LIBRARY = torch.library.Library("cnnops", "DEF")
KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
POOLED_BYTES = 1 << 16
_DEVICES = ("cpu", "meta", "cuda") if C.cuda_build() else ("cpu", "meta")
# DLPack's type code and width.
_DLPACK_TYPES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.uint8: (1, 8),
    torch.int64: (0, 64),
}
OPERATORS: dict[str, Operator] = {}
C.set_plain_types(*_PLAIN_TYPES)
C.set_watched(
    [
        torch._C._is_any_autocast_enabled,
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._get_tracing_state,
    ]
)


class Operator:
    """One operator of ``torch.ops.cnnops``.

    Args:
        schema: ``name(arguments) -> results`` in torch's schema language, functional (nothing is mutated, no aliases).
        kernel: computes the results, on the CPU or on a CUDA device; called with the arguments in the schema's order,
            all of them.
        fake: the same without data: returns empty tensors of exactly the kernel's shapes, dtypes and strides.
        setup_context, backward: as for ``torch.library.register_autograd``; ``backward`` must use differentiable
            functions only (other operators' functions), which makes higher derivatives right. None: not differentiable.
        foldable: positions of the tensor arguments that share the batch dimension N with every result, when vmap may
            fold its dimension into N; other arguments must not be batched then. vmap loops otherwise.
        autocast: positions of the tensors that autocast casts to its dtype; none: autocast leaves the operator alone.
        flops: the number of floating-point operations from the arguments' shapes, for ``FlopCounterMode``.
        direct: the name of the extension's function that takes the same arguments and :func:`threads`, for what
            :func:`direct` says.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
        foldable: Sequence[int] = (),
        autocast: Sequence[int] = (),
        flops: Callable[..., int] | None = None,
        direct: str | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.kernel = kernel
        self.direct = getattr(C, direct) if direct else None
        self.foldable = tuple(foldable)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"cnnops::{self.name}"
        LIBRARY.impl(self.name, kernel, "CPU")
        if "cuda" in _DEVICES:
            LIBRARY.impl(self.name, kernel, "CUDA")
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        self.public = getattr(torch.ops.cnnops, self.name).default
        self.function: type[torch.autograd.Function] | None = None
        if backward is not None:
            assert setup_context is not None
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
            self.function = _eager_function(self.name, kernel, setup_context, backward)
        self.transformed = _functorch_function(self, setup_context, backward)
        torch.library.register_vmap(qualified, self._vmap, lib=LIBRARY)
        if autocast:
            for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
                LIBRARY.impl(self.name, _autocasting(self, tuple(autocast), device, key), key)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.cnnops, self.name))(flops)
        OPERATORS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if self.direct is not None and not torch.is_grad_enabled() and direct():
            made = self.direct(*args, threads())
            if made is not None:
                return made
        if is_compiling():
            return self.public(*args)
        if torch._C._are_functorch_transforms_active():
            return self.transformed.apply(*args)
        if not _plain(args):
            return self.public(*args)
        if self.function is not None and torch.is_grad_enabled() and _requires_grad(args):
            return self.function.apply(*args)
        return self.kernel(*args)

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        batched = [i for i, d in enumerate(in_dims) if isinstance(d, int)]
        if batched and all(i in self.foldable for i in batched):
            folded, size = list(args), info.batch_size
            for i in self.foldable:
                value = args[i]
                if not isinstance(value, Tensor):
                    continue
                value = value.movedim(in_dims[i], 0) if i in batched else value.expand(size, *value.shape)
                folded[i] = value.flatten(0, 1)
            out = self(*folded)
            return pytree.tree_map(lambda t: t.unflatten(0, (size, -1)), out), pytree.tree_map(lambda _: 0, out)
        results = []
        for b in range(info.batch_size):
            one = [a.select(d, b) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
            results.append(self(*one))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])


def _eager_function(
    name: str, kernel: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    # The ctx style (no setup_context of torch's own) is 2 µs a call cheaper.
    def forward(ctx: Any, *args: Any) -> Any:
        out = kernel(*args)
        setup_context(ctx, args, out)
        return out

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _functorch_function(
    op: Operator, setup_context: Callable[..., None] | None, backward: Callable[..., Any] | None
) -> type[torch.autograd.Function]:
    def no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def no_backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"cnnops::{op.name} has no derivative")

    members = {
        "forward": lambda *args: op(*args),
        "setup_context": setup_context or no_context,
        "backward": backward or no_backward,
        "vmap": op._vmap,
    }
    return type(op.name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})


def _autocasting(op: Operator, positions: tuple[int, ...], device: str, key: str) -> Callable[..., Any]:
    """The operator's rule for autocast on a device: float32 tensors at these positions go to autocast's dtype."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype)
            if i in positions and isinstance(a, Tensor) and a.dtype in KERNEL_DTYPES - {torch.float64}
            else a
            for i, a in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op.public(*cast)

    return rule


def _plain(args: tuple[Any, ...]) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    for a in args:
        if isinstance(a, Tensor) and (type(a) not in _PLAIN_TYPES or not (a.is_cpu or a.is_cuda) or a.is_neg()):
            return False
        # What a transform saved for backward can outlive it, as a wrapper without data that the dispatcher takes off.
        if type(a) is Tensor and _functorch.is_functorch_wrapped_tensor(a):
            return False
    return True


def _requires_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def direct() -> bool:
    """Whether a call on plain tensors has nobody to consult: no compiler, autocast, transform, mode or trace is active.

    Then the extension's functions ending in ``_direct`` may be asked, which allocate the result and run the kernel in
    one call, or refuse with None what is not plain.
    """
    return not is_compiling() and forward_ad._current_level < 0 and C.undisturbed()


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that :func:`direct` allows: without its look at transforms, which takes 1 µs."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def recorder(
    name: str, gradient: Operator
) -> Callable[[Tensor, tuple[Tensor, Tensor | None, tuple[Any, ...]]], Tensor]:
    """A function that gives a result, which the extension has computed already, its derivative for one input.

    It takes that input and, in a tuple, the result, what is to be saved for the gradient (or None), and the arguments
    with which ``gradient`` is called after the result's gradient and what was saved.
    """

    def forward(ctx: Any, x: Tensor, made: tuple[Tensor, Tensor | None, tuple[Any, ...]]) -> Tensor:
        y, saved, ctx.arguments = made
        if saved is not None:
            ctx.save_for_backward(saved)
        return y

    function = gradient.direct

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors  # once: checkpoints unpack no tensor twice
        if function is not None and not torch.is_grad_enabled() and direct():
            made: tuple[Tensor, None] | None = C.gradient_direct(function, dy, saved, ctx.arguments, threads())
            if made is not None:
                return made
        return gradient(dy, *saved, *ctx.arguments), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return applier(type(name, (torch.autograd.Function,), members))


def supported(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: strided, of one of the four float dtypes, on the CPU (or meta, or fake)
    or, in builds with CUDA kernels, on a CUDA device of compute capability 8.0 or more.

    Not so what is no tensor, a meta input beside a weight that is none (PyTorch takes them), and a tensor subclass that
    knows PyTorch's ops alone (distributed, masked, quantized ones).
    """
    if input is None:
        return False
    for t in (input, *tensors):  # no generator: this runs in every call
        if t is None:
            continue
        if type(t) not in _PLAIN_TYPES and not transparent(type(t)):
            return False
        if t.dtype not in KERNEL_DTYPES or t.layout is not torch.strided:
            return False
        device = t.device.type
        if device not in _DEVICES or (input.is_meta and not t.is_meta):
            return False
        if device == "cuda" and not _capable(t.device.index):
            return False
    return True


def _capable(device: int | None) -> bool:
    return _capability(device) >= (8, 0)


# For dynamo, which would otherwise put torch's question into the graph. torch.compiler.assume_constant_result does it
# too, and imports all of the compiler.
_capable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(device: int | None) -> tuple[int, int]:
    # A fake tensor on "cuda" can live where there is no device at all.
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def transparent(kind: type) -> bool:
    """Whether tensors of this class take any operator: fake and functional ones, and those that override nothing."""
    if not issubclass(kind, Tensor):
        return False
    if kind.__module__.startswith("torch._subclasses."):
        return True
    handler = kind.__torch_function__
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and (
        handler is torch._C._disabled_torch_function_impl
        or getattr(handler, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )


def needs_composite(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's own ops must do it: they carry forward-mode derivatives, and jit.trace records them."""
    if is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active():
        interpreters = torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters()
        return any(i.key() == _functorch.TransformType.Jvp for i in interpreters)
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def memory_format(t: Tensor) -> torch.memory_format:
    """The memory format that PyTorch's ops give their result for this 4-D argument (``suggest_memory_format``)."""
    stride = t.stride()
    if stride[3] == 1 and stride[1] != 1:
        return torch.contiguous_format
    smallest = 0
    for d in (1, 3, 2, 0):
        if t.shape[d] == 0 or stride[d] < smallest or (d == 0 and smallest == stride[1]):
            return torch.contiguous_format
        smallest = stride[d] * (t.shape[d] if t.shape[d] > 1 else 1)
    return torch.channels_last


def dense(t: Tensor, format: torch.memory_format) -> Tensor:
    """The tensor itself where it lies in this format without gaps, else a copy that does."""
    return t if t.is_contiguous(memory_format=format) else t.contiguous(memory_format=format)


def empty(shape: Sequence[int], like: Tensor, format: torch.memory_format, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor for a result; in pooled memory (:mod:`cnnops.memory`) where it is large and real."""
    dtype = dtype or like.dtype
    if type(like) in _PLAIN_TYPES and like.is_cpu and math.prod(shape) * dtype.itemsize >= POOLED_BYTES:
        return C.empty(like, shape, *_DLPACK_TYPES[dtype], format is torch.channels_last)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=format)


def threads() -> int:
    """How many threads a kernel uses: as many as torch's own ops, but one in a forked child.

    A fork copies libgomp's list of threads but not the threads, and a parallel region in the child waits for them.
    """
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def pair(value: Any, name: str, op: str) -> tuple[int, int]:
    """An int or a pair of ints as a pair."""
    if isinstance(value, (int, torch.SymInt)):
        return (value, value)  # type: ignore[return-value]
    values: tuple[Any, ...]
    try:
        values = (operator.index(value),)  # NumPy's integers, and tensors of one
    except TypeError:
        try:
            values = tuple(v if isinstance(v, torch.SymInt) else operator.index(v) for v in value)
        except TypeError:
            values = ()
    if len(values) == 1:
        values *= 2
    if not values:
        raise TypeError(f"{op}(): argument '{name}' must be an int or a pair of ints, not {value!r}")
    if len(values) != 2:
        raise RuntimeError(f"{op}(): argument '{name}' must be an int or a pair of ints, but got {values}")
    return values[0], values[1]


def prod(values: Sequence[int]) -> int:
    return math.prod(values)


__all__ = [
    "POOLED_BYTES",
    "C",
    "Operator",
    "applier",
    "dense",
    "direct",
    "empty",
    "is_compiling",
    "memory_format",
    "needs_composite",
    "pair",
    "recorder",
    "supported",
    "threads",
    "transparent",
]
