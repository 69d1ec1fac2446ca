"""Median pooling (contract: ``csrc/ops/median_pool2d.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._core import C, needs_composite, supported
from ._pooling import Pair, as_images, check_bool, output_size, plane_fits, window
from .index_pool2d import PickOperators

median_pool2d_op = PickOperators("median_pool2d", C.median_pool2d_forward)


def _positions(outputs: int, kernel: int, stride: int, padding: int, dilation: int, device: torch.device) -> Tensor:
    """Where the taps of an axis's windows lie, [outputs, kernel]: outside the image too."""
    begin = torch.arange(outputs, device=device) * stride - padding
    return begin.unsqueeze(1) + torch.arange(kernel, device=device) * dilation


def _composite(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    """The same of PyTorch's own ops, differentiable in every way; takes the memory of all windows' cells."""
    if x.dtype is torch.bool or x.is_complex():
        raise NotImplementedError(f"median_pool2d(): not implemented for input of {x.dtype}")
    p, q = output_size("median_pool2d", x, kernel, stride, padding, dilation, ceil_mode)
    h, w = x.shape[2:]
    rows = _positions(p, kernel[0], stride[0], padding[0], dilation[0], x.device).view(p, 1, kernel[0], 1)
    columns = _positions(q, kernel[1], stride[1], padding[1], dilation[1], x.device).view(1, q, 1, kernel[1])
    inside = ((rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)).flatten(2)  # [P, Q, cells]
    cells = x[:, :, rows.clamp(0, h - 1), columns.clamp(0, w - 1)].flatten(4)  # [N, C, P, Q, cells]
    values = cells.detach()
    highest = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
    count = inside.sum(2)
    rank = ((count - 1).clamp(min=0) // 2).expand(values.shape[:-1]).unsqueeze(-1)
    # Sorting puts what is filled in behind, and NaN behind that; the NaNs are dealt with apart.
    median = values.masked_fill(~inside, highest).sort(dim=-1).values.gather(-1, rank)
    nan = inside & (values != values)
    has_nan = nan.any(-1, keepdim=True)
    chosen = torch.where(has_nan, nan, inside & (values == median)).to(torch.uint8).argmax(-1, keepdim=True)
    y = cells.gather(-1, chosen).squeeze(-1)
    return torch.where(count > 0, y, float("nan")) if x.is_floating_point() else y


def median_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Median pooling, with the arguments of :func:`max_pool2d`.

    The median of an even number of values is the lower of the middle two, as for :func:`torch.median`; a NaN in a
    window gives NaN. Padding takes no part: windows at the border have fewer values. The gradient goes to the chosen
    element, the first in row-major order that equals the median.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size, stride, padding, dilation: in pixels, an int or a pair (height, width); stride is kernel_size by
            default; padding is at most half the kernel.
        ceil_mode: round the output size up: windows may run past the padded input, but begin inside of it.

    Returns:
        ``[N, C, P, Q]`` (or ``[C, P, Q]``) in the input's memory format. NaN where a dilation beyond the input leaves a
        window without a pixel.

    Raises:
        TypeError, ValueError or RuntimeError, as :func:`max_pool2d`.

    Example:
        >>> median_pool2d(torch.tensor([[[1.0, 9.0, 2.0], [3.0, 5.0, 4.0], [8.0, 7.0, 6.0]]]), 3)
        tensor([[[5.]]])
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"median_pool2d(): argument 'input' must be Tensor, not {type(input).__name__}")
    check_bool(ceil_mode, "ceil_mode", "median_pool2d")
    pairs = window("median_pool2d", kernel_size, stride, padding, dilation)
    x = as_images("median_pool2d", input)
    if supported(input) and not needs_composite(input) and plane_fits(input, pairs[2]):
        y = median_pool2d_op(x, *pairs, ceil_mode)
    else:
        y = _composite(x, *pairs, ceil_mode)
    return y if input.dim() == 4 else y.squeeze(0)
