"""Activations that are layers of their own: PyTorch's kernels, with results and gradients in pooled memory.

What PyTorch allocates for them are fresh pages at every step, which cost more than the arithmetic. Activations that a
layer fuses (``_activation.py``) never come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._core import KERNEL_DTYPES, applier, direct, empty, memory_format

_aten = torch.ops.aten


class _Kind(NamedTuple):
    """PyTorch's functions of an activation. The gradient takes dy, then the result or the input, as
    ``result_is_enough`` says: there the function leaves its own result as it is, with the same slope."""

    function: Callable[[Tensor], Tensor]
    forward: Callable[..., Tensor]  # with out=
    backward: Callable[..., Tensor]  # with grad_input= or out=, as `into` says
    arguments: tuple[float, ...] = ()  # of the last two
    result_is_enough: bool = False
    into: str = "grad_input"


_KINDS: dict[str, _Kind] = {
    "relu": _Kind(F.relu, _aten.clamp_min.out, _aten.threshold_backward.grad_input, (0,), True),
    "relu6": _Kind(F.relu6, _aten.hardtanh.out, _aten.hardtanh_backward.grad_input, (0, 6), True),
    "silu": _Kind(F.silu, _aten.silu.out, _aten.silu_backward.grad_input),
    "hardswish": _Kind(F.hardswish, _aten.hardswish.out, _aten.hardswish_backward.out, into="out"),
    "gelu": _Kind(F.gelu, _aten.gelu.out, _aten.gelu_backward.grad_input),
}


def activation_layer(name: str, x: Tensor, inplace: bool) -> Tensor | None:
    """``name`` of x, into x where ``inplace``; None where PyTorch's own layer is to do it.

    That is: tensors that no kernel of cnnops takes, transforms, modes and traces, and what PyTorch refuses to compute
    in place. Small tensors and subclasses, with nothing to gain, do not come here.
    """
    if (
        not direct()
        or not x.is_cpu
        or x.dim() != 4
        or x.dtype not in KERNEL_DTYPES
        or not x.is_contiguous(memory_format=memory_format(x))
    ):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        if inplace and (x.is_leaf or x._is_view()):
            return None
        if inplace and not _KINDS[name].result_is_enough:
            return _apply(name, _copy(x), x)
        return _apply(name, x, x if inplace else None)
    if inplace:
        return None  # nothing is allocated
    return _forward(_KINDS[name], x, None)


def _forward(kind: _Kind, x: Tensor, into: Tensor | None) -> Tensor:
    y = empty(x.shape, x, memory_format(x)) if into is None else into
    kind.forward(x, *kind.arguments, out=y)
    return y


class _Activation(torch.autograd.Function):
    """Of x, into a new tensor, into x itself, or into the tensor that x was copied from."""

    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, into: Tensor | None) -> Tensor:
        kind = ctx.kind = _KINDS[name]
        y = _forward(kind, x, into)
        if into is not None:
            ctx.mark_dirty(into)
        ctx.save_for_backward(y if kind.result_is_enough else x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (saved,), kind = ctx.saved_tensors, ctx.kind
        again = torch.is_grad_enabled()
        if again or type(dy) is not Tensor or not direct():
            with torch.enable_grad():
                at = saved if saved.requires_grad else saved.detach().requires_grad_()
                (dx,) = torch.autograd.grad(kind.function(at), at, dy, create_graph=again)
            return None, dx, None
        dx = empty(saved.shape, saved, memory_format(saved))
        kind.backward(dy, saved, *kind.arguments, **{kind.into: dx})
        return None, dx, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return empty(x.shape, x, memory_format(x)).copy_(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


_apply, _copy = applier(_Activation), applier(_Copy)

__all__ = ["activation_layer"]
