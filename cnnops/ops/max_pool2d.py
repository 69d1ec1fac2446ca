"""Max pooling (contract: ``csrc/ops/max_pool2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._core import C, direct, needs_composite, supported, threads
from ._pooling import as_images, check_bool, plane_fits, takes_over, window
from .index_pool2d import PickOperators, finisher

max_pool2d_op = PickOperators("max_pool2d", C.max_pool2d_forward)
_finish = finisher("max_pool2d_pick")


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Max pooling, as :func:`torch.nn.functional.max_pool2d`.

    Of equal values the first in row-major order is chosen; a NaN in a window is its maximum, the last of several.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size, stride, padding, dilation: in pixels, an int or a pair (height, width); stride is kernel_size by
            default; padding is at most half the kernel, and is never chosen.
        ceil_mode: round the output size up: windows may run past the padded input, but begin inside of it.
        return_indices: also return where in the plane each maximum was found, ``h * W + w``, int64 (-1 for a window
            that a dilation beyond the input leaves without a pixel).

    Returns:
        ``[N, C, P, Q]`` (or ``[C, P, Q]``) in the input's memory format, or that and the indices.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])
    """
    if direct():
        made = C.max_pool2d_direct(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices, torch.is_grad_enabled(), threads()
        )
        if made is not None:
            return _finish(input, made, return_indices)
    if takes_over("max_pool2d", input) or not supported(input) or needs_composite(input):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    check_bool(ceil_mode, "ceil_mode", "max_pool2d")
    pairs = window("max_pool2d", kernel_size, stride, padding, dilation)
    x = as_images("max_pool2d", input)
    if not plane_fits(input, pairs[2]):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if return_indices:
        y, indices = max_pool2d_op.pick(x, *pairs, ceil_mode, False)
        return (y, indices) if input.dim() == 4 else (y.squeeze(0), indices.squeeze(0))
    y = max_pool2d_op(x, *pairs, ceil_mode)
    return y if input.dim() == 4 else y.squeeze(0)
