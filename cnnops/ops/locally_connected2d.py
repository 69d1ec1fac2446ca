"""A convolution whose filters are not shared between positions (contract: ``csrc/ops/locally_connected2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _padding
from ._core import C, Operator, dense, empty, memory_format, needs_composite, pair, supported, threads
from .conv2d import _autocast

_OP = "locally_connected2d"


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    y = _fake(x, weight, bias, stride, padding, dilation)
    if y.numel():
        x = dense(x, memory_format(x))
        bias = None if bias is None else bias.contiguous()
        C.locally_connected2d_forward(y, x, weight.contiguous(), bias, stride, padding, dilation, threads())
    return y


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    p, q, k = weight.shape[:3]
    return empty((x.shape[0], k, p, q), x, memory_format(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.geometry = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
    ctx.input_size, ctx.kernel_size, ctx.format = x.shape[2:], weight.shape[4:], memory_format(x)
    ctx.bias_dims = 0 if bias is None else bias.dim()


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = input_grad(dense(dy, ctx.format), weight, *ctx.input_size, *ctx.geometry)
    if ctx.needs_input_grad[1]:
        dw = weight_grad(dy, x, *ctx.kernel_size, *ctx.geometry)
    if ctx.needs_input_grad[2]:
        db = dy.sum(0) if ctx.bias_dims == 3 else dy.sum((0, 2, 3))
    return dx, dw, db, None, None, None


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    total = 2 * x[0]
    for size in weight:
        total *= size
    return total


locally_connected2d_op = Operator(
    "locally_connected2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) "
    "-> Tensor",
    _kernel, _fake, setup_context=_setup, backward=_backward, foldable=(0,), flops=_flops,
    autocast=(0, 1, 2),
)  # fmt: skip


def _input_kernel(
    dy: Tensor, weight: Tensor, h: int, w: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    dx = _input_fake(dy, weight, h, w)
    if dx.numel():
        dy = dense(dy, memory_format(dy))
        C.locally_connected2d_input_grad(dx, dy, weight.contiguous(), stride, padding, dilation, threads())
    return dx


def _input_fake(dy: Tensor, weight: Tensor, h: int, w: int, *_: Any) -> Tensor:
    return empty((dy.shape[0], weight.shape[3], h, w), dy, memory_format(dy))


def _input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, _, _, *ctx.geometry = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs[1] else None, weight if needs[0] else None)
    ctx.kernel_size = weight.shape[4:]


def _input_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, weight = ctx.saved_tensors
    ddy = locally_connected2d_op(ddx, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dw = weight_grad(dy, ddx, *ctx.kernel_size, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return ddy, dw, None, None, None, None, None


input_grad = Operator(
    "locally_connected2d_input_grad(Tensor dy, Tensor weight, SymInt h, SymInt w, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor",
    _input_kernel, _input_fake, setup_context=_input_setup, backward=_input_backward, foldable=(0,),
    flops=lambda dy, weight, *_, **__: _flops(dy, weight), autocast=(0, 1),
)  # fmt: skip


def _weight_kernel(
    dy: Tensor, x: Tensor, r: int, s: int, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    dw = _weight_fake(dy, x, r, s)
    if not x.shape[0]:
        return dw.zero_()
    if dw.numel():
        format = memory_format(x)
        C.locally_connected2d_weight_grad(dw, dense(dy, format), dense(x, format), stride, padding, dilation, threads())
    return dw


def _weight_fake(dy: Tensor, x: Tensor, r: int, s: int, *_: Any) -> Tensor:
    return empty((dy.shape[2], dy.shape[3], dy.shape[1], x.shape[1], r, s), x, torch.contiguous_format)


def _weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, _, *ctx.geometry = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(dy if needs[1] else None, x if needs[0] else None)
    ctx.input_size = x.shape[2:]


def _weight_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x = ctx.saved_tensors
    ddy = locally_connected2d_op(x, ddw, None, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dx = input_grad(dy, ddw, *ctx.input_size, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None, None, None, None


weight_grad = Operator(
    "locally_connected2d_weight_grad(Tensor dy, Tensor x, SymInt r, SymInt s, int[2] stride, int[2] padding, "
    "int[2] dilation) -> Tensor",
    _weight_kernel, _weight_fake, setup_context=_weight_setup, backward=_weight_backward,
    flops=lambda dy, x, r, s, *_, **__: 2 * dy[0] * dy[1] * dy[2] * dy[3] * x[1] * r * s, autocast=(0, 1),
)  # fmt: skip


def _composite(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], sides: tuple[int, int, int, int],
    dilation: tuple[int, int]
) -> Tensor:  # fmt: skip
    top, bottom, left, right = sides
    patches = F.pad(x, (left, right, top, bottom))
    for axis in (0, 1):
        reach = dilation[axis] * (weight.shape[4 + axis] - 1) + 1
        patches = patches.unfold(2 + axis, reach, stride[axis])
    patches = patches[..., :: dilation[0], :: dilation[1]]
    y = torch.einsum("ncpqrs,pqkcrs->nkpq", patches, weight)
    if bias is not None:
        y = y + (bias if bias.dim() == 3 else bias[:, None, None])
    return y.contiguous(memory_format=memory_format(x))


def locally_connected2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A convolution whose filters are not shared: every output position has filters of its own.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[P, Q, K, C, R, S]`` for an output of P x Q positions and K channels and filters of R x S taps. The
            positions come first, so that the filters of one lie together: they are read once, and the reading decides
            the time.
        bias: ``[K]``, one number per output channel, as a convolution's, or ``[K, P, Q]``, one per output element, in
            keeping with filters that are not shared either; of the latter ``[K]`` is a special case with fewer
            parameters.
        stride, dilation: in pixels, an int or a pair (height, width).
        padding: zeros around the image: an int, a pair, ``"valid"`` (none), ``"same"`` (P = ceil(H / stride), likewise
            Q; an odd one at the bottom and the right) or ``"full"`` (``dilation * (kernel - 1)`` on each side).

    Returns:
        ``[N, K, P, Q]`` (or ``[K, P, Q]``) in the input's memory format, with
        ``P = (H + padding - dilation * (R - 1) - 1) // stride + 1``, padding at the top and the bottom together.

    Raises:
        TypeError: padding, stride or dilation is not made of ints.
        RuntimeError: shapes, dtypes or devices that do not go together, non-positive stride or dilation, negative or
            unknown padding, a kernel larger than the padded input.

    Example:
        >>> weight = torch.randn(6, 6, 4, 3, 3, 3)
        >>> locally_connected2d(torch.randn(2, 3, 8, 8), weight).shape
        torch.Size([2, 4, 6, 6])
    """
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)  # type: ignore[assignment]
    step, spread = pair(stride, "stride", _OP), pair(dilation, "dilation", _OP)
    if min(step) <= 0 or min(spread) <= 0:
        raise RuntimeError(f"{_OP}(): stride and dilation must be positive, but got {step} and {spread}")
    if weight.dim() != 6:
        raise RuntimeError(f"{_OP}(): expected weight of shape [P, Q, K, C, R, S], but got {list(weight.shape)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{_OP}(): expected input of shape [N, C, H, W] or [C, H, W], but got {list(input.shape)}")
    x = input if input.dim() == 4 else input.unsqueeze(0)
    p, q, k, c, r, s = weight.shape
    if x.shape[1] != c:
        raise RuntimeError(
            f"{_OP}(): weight of shape {list(weight.shape)} expects input with {c} channels, but got "
            f"{list(input.shape)}"
        )
    if min(k, r, s) == 0 or c == 0:
        raise RuntimeError(f"{_OP}(): weight must have channels and taps, but got {list(weight.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != input.dtype or other.device != input.device):
            raise RuntimeError(
                f"{_OP}(): expected {name} in {input.dtype} on {input.device}, as the input is, but got {other.dtype} "
                f"on {other.device}"
            )
    sides = _padding.resolve(_OP, padding, x.shape[2:], (r, s), step, spread)
    height, width = x.shape[2] + sides[0] + sides[1], x.shape[3] + sides[2] + sides[3]
    reach = spread[0] * (r - 1) + 1, spread[1] * (s - 1) + 1
    if reach[0] > height or reach[1] > width:
        raise RuntimeError(
            f"{_OP}(): the kernel of {(r, s)} with dilation {spread} is larger than the padded input of "
            f"{(height, width)}"
        )
    output = (height - reach[0]) // step[0] + 1, (width - reach[1]) // step[1] + 1
    if output != (p, q):
        raise RuntimeError(
            f"{_OP}(): expected weight for the {output[0]} x {output[1]} output positions of input "
            f"{list(input.shape)}, but it is {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) not in ((k,), (k, p, q)):
        raise RuntimeError(f"{_OP}(): expected bias of shape {[k]} or {[k, p, q]}, but got {list(bias.shape)}")
    if not supported(x, weight, bias) or needs_composite(x, weight, bias):
        y = _composite(x, weight, bias, step, sides, spread)
    else:
        y = locally_connected2d_op(x, weight, bias, step, (sides[0], sides[2]), spread)
    return y if input.dim() == 4 else y.squeeze(0)
