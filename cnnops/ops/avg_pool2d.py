"""Mean pooling (contract: ``csrc/ops/avg_pool2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._core import C, Operator, dense, direct, empty, memory_format, needs_composite, recorder, supported, threads
from ._pooling import as_images, check_bool, is_int, output_size, takes_over, window


def _kernel(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    y = _fake(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    if y.numel():
        x = dense(x, memory_format(x))
        C.avg_pool2d_forward(y, x, kernel, stride, padding, count_include_pad, divisor, threads())
    return y


def _fake(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
) -> Tensor:
    p, q = output_size("avg_pool2d", x, kernel, stride, padding, (1, 1), ceil_mode)
    return empty((x.shape[0], x.shape[1], p, q), x, memory_format(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]
    ctx.channels_last = memory_format(x) is torch.channels_last


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return avg_pool2d_backward(dy, *ctx.size, *ctx.window, ctx.channels_last), *[None] * len(ctx.window)


avg_pool2d_op = Operator(
    "avg_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, "
    "int divisor) -> Tensor",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_backward,
    foldable=(0,),
)


def _backward_kernel(
    dy: Tensor,
    h: int,
    w: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
    channels_last: bool,
) -> Tensor:
    dx = _backward_fake(dy, h, w, channels_last)
    if dx.numel():
        dy = dense(dy, torch.channels_last if channels_last else torch.contiguous_format)
        C.avg_pool2d_backward(dx, dy, kernel, stride, padding, count_include_pad, divisor, threads())
    return dx


def _backward_fake(dy: Tensor, h: int, w: int, *window: Any) -> Tensor:
    format = torch.channels_last if window[-1] else torch.contiguous_format
    return empty((dy.shape[0], dy.shape[1], h, w), dy, format)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.window = inputs[3:-1]


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return avg_pool2d_op(ddx, *ctx.window), *[None] * 9


avg_pool2d_backward = Operator(
    "avg_pool2d_backward(Tensor dy, SymInt h, SymInt w, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int divisor, bool channels_last) -> Tensor",
    _backward_kernel,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_backward_backward,
    foldable=(0,),
    direct="avg_pool2d_backward_direct",
)
_record = recorder("avg_pool2d", avg_pool2d_backward)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean pooling, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size, stride, padding: in pixels, an int or a pair (height, width); stride is kernel_size by default;
            padding is at most half the kernel.
        ceil_mode: round the output size up: windows may run past the padded input, but begin inside of it.
        count_include_pad: whether the mean counts the zeros of the padding.
        divisor_override: divide by this instead of by the number of cells.

    Returns:
        ``[N, C, P, Q]`` (or ``[C, P, Q]``) in the input's memory format.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> avg_pool2d(torch.ones(1, 3, 8, 8), 2).shape
        torch.Size([1, 3, 4, 4])
    """
    if divisor_override is None and direct():
        made = C.avg_pool2d_direct(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, torch.is_grad_enabled(), threads()
        )
        if made is not None:
            return _record(input, made) if type(made) is tuple else made
    if takes_over("avg_pool2d", input) or not supported(input) or needs_composite(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    check_bool(ceil_mode, "ceil_mode", "avg_pool2d")
    check_bool(count_include_pad, "count_include_pad", "avg_pool2d")
    kernel, step, pad, _ = window("avg_pool2d", kernel_size, stride, padding)
    if divisor_override is not None:
        if not is_int(divisor_override):
            raise TypeError(f"avg_pool2d(): argument 'divisor_override' must be int, but got {divisor_override!r}")
        if divisor_override == 0:
            raise RuntimeError("avg_pool2d(): divisor_override must not be zero")
    x = as_images("avg_pool2d", input)
    y = avg_pool2d_op(x, kernel, step, pad, ceil_mode, count_include_pad, divisor_override or 0)
    return y if input.dim() == 4 else y.squeeze(0)
