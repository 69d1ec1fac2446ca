"""Mean pooling to a given size (contract: ``csrc/ops/adaptive_avg_pool2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._core import C, Operator, dense, direct, empty, memory_format, needs_composite, recorder, threads
from ._pooling import adaptable, adaptive_by_pytorch, adaptive_images, adaptive_size, takes_over


def _even(x_shape: Sequence[int], y_shape: Sequence[int]) -> list[int] | None:
    """The kernel of the mean pooling that this is, where windows are equal, side by side and several."""
    (h, w), (p, q) = x_shape[2:], y_shape[2:]
    return [h // p, w // q] if h % p == 0 and w % q == 0 and p * q > 1 else None


def _kernel(x: Tensor, output_size: list[int]) -> Tensor:
    y = _fake(x, output_size)
    if y.numel():
        x = dense(x, memory_format(x))
        kernel = _even(x.shape, y.shape)
        # The CPU's adaptive kernel, which the direct call takes too, sums long rows and channels as fast.
        if kernel and not (x.is_cpu and (kernel[1] >= 8 or memory_format(x) is torch.channels_last)):
            C.avg_pool2d_forward(y, x, kernel, kernel, (0, 0), False, 0, threads())
        else:
            C.adaptive_avg_pool2d_forward(y, x, threads())
    return y


def _fake(x: Tensor, output_size: list[int]) -> Tensor:
    return empty((x.shape[0], x.shape[1], *output_size), x, memory_format(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _ = inputs
    ctx.size = x.shape[2:]
    ctx.channels_last = memory_format(x) is torch.channels_last


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return adaptive_avg_pool2d_backward(dy, *ctx.size, ctx.channels_last), None


adaptive_avg_pool2d_op = Operator(
    "adaptive_avg_pool2d(Tensor x, SymInt[2] output_size) -> Tensor",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_backward,
    foldable=(0,),
)


def _backward_kernel(dy: Tensor, h: int, w: int, channels_last: bool) -> Tensor:
    dx = _backward_fake(dy, h, w, channels_last)
    if not dy.numel():
        return dx.zero_()
    dy = dense(dy, torch.channels_last if channels_last else torch.contiguous_format)
    kernel = _even(dx.shape, dy.shape)
    if kernel:
        C.avg_pool2d_backward(dx, dy, kernel, kernel, (0, 0), False, 0, threads())
    else:
        C.adaptive_avg_pool2d_backward(dx, dy, threads())
    return dx


def _backward_fake(dy: Tensor, h: int, w: int, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return empty((dy.shape[0], dy.shape[1], h, w), dy, format)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.output_size = inputs[0].shape[2:]


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return adaptive_avg_pool2d_op(ddx, list(ctx.output_size)), None, None, None


adaptive_avg_pool2d_backward = Operator(
    "adaptive_avg_pool2d_backward(Tensor dy, SymInt h, SymInt w, bool channels_last) -> Tensor",
    _backward_kernel,
    _backward_fake,
    setup_context=_backward_setup,
    backward=_backward_backward,
    foldable=(0,),
    direct="adaptive_avg_pool2d_backward_direct",
)
_record = recorder("adaptive_avg_pool2d", adaptive_avg_pool2d_backward)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean pooling to a given size, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Output row ``i`` of ``P`` is the mean of the input's rows ``floor(i * H / P)`` to ``ceil((i + 1) * H / P)``; columns
    alike.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: an int or a pair (height, width); None for the input's own size.

    Returns:
        ``[N, C, P, Q]`` (or ``[C, P, Q]``) in the input's memory format.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> adaptive_avg_pool2d(torch.ones(1, 3, 7, 8), (1, 4)).shape
        torch.Size([1, 3, 1, 4])
    """
    if direct():
        made = C.adaptive_avg_pool2d_direct(input, output_size, torch.is_grad_enabled(), threads())
        if made is not None:
            return _record(input, made) if type(made) is tuple else made
    if takes_over("adaptive_avg_pool2d", input) or not adaptable(input) or needs_composite(input):
        return adaptive_by_pytorch("adaptive_avg_pool2d", input, output_size)
    size = adaptive_size("adaptive_avg_pool2d", input, output_size)
    x = adaptive_images("adaptive_avg_pool2d", input, channels_too=False)
    if tuple(size) == tuple(x.shape[2:]):  # each cell is its own mean
        return input.clone(memory_format=memory_format(x) if input.dim() == 4 else torch.contiguous_format)
    y = adaptive_avg_pool2d_op(x, size)
    return y if input.dim() == 4 else y.squeeze(0)
