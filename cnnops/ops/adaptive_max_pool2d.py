"""Max pooling to a given size (contract: ``csrc/ops/adaptive_max_pool2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._core import C, Operator, dense, direct, empty, memory_format, needs_composite, threads
from ._pooling import adaptable, adaptive_by_pytorch, adaptive_images, adaptive_size, plane_fits, takes_over
from .index_pool2d import finisher, index_pool2d_backward

_ADAPTIVE = (None, (1, 1), (0, 0), (1, 1))  # the windows, as index_pool2d takes them


def _kernel(x: Tensor, output_size: list[int]) -> tuple[Tensor, Tensor]:
    y, indices = _fake(x, output_size)
    if y.numel():
        x = dense(x, memory_format(x))
        h, w = x.shape[2:]
        p, q = output_size
        if h % p == 0 and w % q == 0 and p * q > 1:  # equal windows, side by side
            kernel = (h // p, w // q)
            C.max_pool2d_forward(y, indices, x, kernel, kernel, (0, 0), (1, 1), threads())
        else:
            C.adaptive_max_pool2d_forward(y, indices, x, threads())
    return y, indices


def _fake(x: Tensor, output_size: list[int]) -> tuple[Tensor, Tensor]:
    shape, format = (x.shape[0], x.shape[1], *output_size), memory_format(x)
    return empty(shape, x, format), empty(shape, x, format, torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return None, None
    return index_pool2d_backward(dy, *ctx.saved_tensors, *ctx.size, *_ADAPTIVE), None


adaptive_max_pool2d_op = Operator(
    "adaptive_max_pool2d(Tensor x, SymInt[2] output_size) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_backward,
    foldable=(0,),
)
_finish = finisher("adaptive_max_pool2d")


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Max pooling to a given size, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    Output row ``i`` of ``P`` is the maximum of the input's rows ``floor(i * H / P)`` to ``ceil((i + 1) * H / P)``;
    columns alike. Of equal values the first in row-major order is chosen; of NaNs the last.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: an int or a pair (height, width); None for the input's own size.
        return_indices: also return where in the plane each maximum was found, ``h * W + w``, int64.

    Returns:
        ``[N, C, P, Q]`` (or ``[C, P, Q]``) in the input's memory format, or that and the indices.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> adaptive_max_pool2d(torch.arange(9.0).view(1, 3, 3), 2, return_indices=True)[1]
        tensor([[[4, 5],
                 [7, 8]]])
    """
    if direct():
        made = C.adaptive_max_pool2d_direct(input, output_size, return_indices, torch.is_grad_enabled(), threads())
        if made is not None:
            return _finish(input, made, return_indices)
    if (
        takes_over("adaptive_max_pool2d", input)
        or not adaptable(input)
        or needs_composite(input)
        or not plane_fits(input)
    ):
        return adaptive_by_pytorch("adaptive_max_pool2d", input, output_size, return_indices)
    size = adaptive_size("adaptive_max_pool2d", input, output_size)
    x = adaptive_images("adaptive_max_pool2d", input, channels_too=True)
    y, indices = adaptive_max_pool2d_op(x, size)
    if input.dim() == 3:
        y, indices = y.squeeze(0), indices.squeeze(0)
    return (y, indices) if return_indices else y
