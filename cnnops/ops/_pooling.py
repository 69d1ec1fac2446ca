"""What the pooling operators share: arguments, output sizes and their errors."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._core import supported

Pair = tuple[int, int]

# The kernels count in 32 bits along a window and across a plane, and PyTorch takes no larger arguments.
_LIMIT = 2**31 - 1


def is_int(value: Any) -> bool:
    """Whether torch takes this for an int: what has ``__index__``, but no bool."""
    return not isinstance(value, bool) and (hasattr(value, "__index__") or isinstance(value, torch.SymInt))


def pool_pair(value: Any, name: str, op: str) -> Pair:
    """An int or one or two ints as a pair."""
    values: Any
    if type(value) is int:
        values = (value, value)
    else:
        if is_int(value):
            values = (value,) * 2
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) not in (1, 2):
                raise RuntimeError(f"{op}(): argument '{name}' must be an int or two ints, but got {value!r}")
            values = (value[0], value[-1])
        else:
            values = (None, None)
        if not (is_int(values[0]) and is_int(values[1])):
            raise TypeError(f"{op}(): argument '{name}' must be an int or two ints, but got {value!r}")
        values = (operator.index(values[0]), operator.index(values[1]))
    if max(values) > _LIMIT or min(values) < -_LIMIT:
        error = ValueError if max(map(abs, values)) >= 2**63 else RuntimeError
        raise error(f"{op}(): argument '{name}' must be below 2^31, but got {value!r}")
    return values


def window(
    op: str,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
) -> tuple[Pair, Pair, Pair, Pair]:
    """Kernel, stride, padding and dilation as pairs, checked."""
    kernel = pool_pair(kernel_size, "kernel_size", op)
    step = kernel if stride is None or stride == () or stride == [] else pool_pair(stride, "stride", op)
    pad = pool_pair(padding, "padding", op)
    apart = pool_pair(dilation, "dilation", op)
    for name, pair in (("kernel_size", kernel), ("stride", step), ("dilation", apart)):
        if pair[0] <= 0 or pair[1] <= 0:
            raise RuntimeError(f"{op}(): {name} must be positive, but got {pair}")
    if min(pad) < 0:
        raise RuntimeError(f"{op}(): padding must not be negative, but got {pad}")
    if pad[0] > kernel[0] // 2 or pad[1] > kernel[1] // 2:
        raise RuntimeError(
            f"{op}(): padding must be at most half of kernel_size, but got padding {pad} and kernel_size {kernel}"
        )
    return kernel, step, pad, apart


def takes_over(op: str, input: Any) -> bool:
    """Whether this is no Tensor but overrides torch functions, as PyTorch must see it; an error for anything else."""
    if isinstance(input, Tensor):
        return False
    if torch.overrides.has_torch_function((input,)):
        return True
    raise TypeError(f"{op}(): argument 'input' must be Tensor, not {type(input).__name__}")


def check_bool(value: Any, name: str, op: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}(): argument '{name}' must be bool, but got {value!r}")


def plane_fits(input: Tensor, padding: Pair = (0, 0)) -> bool:
    """Whether the kernels' 32-bit positions can index a padded plane of this input."""
    return input.dim() < 2 or (input.shape[-2] + 2 * padding[0]) * (input.shape[-1] + 2 * padding[1]) <= _LIMIT


def as_images(op: str, input: Tensor) -> Tensor:
    """The input as [N, C, H, W]; only N may be empty. PyTorch's results for [C, H, W] are always contiguous."""
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        # PyTorch's mean pooling fails with an IndexError on its way to the check of the rank.
        error = IndexError if op == "avg_pool2d" and input.dim() < 3 else RuntimeError
        raise error(
            f"{op}(): expected input of shape [N, C, H, W] or [C, H, W] with non-empty C, H and W, "
            f"but got {list(input.shape)}"
        )
    return input if input.dim() == 4 else input.contiguous().unsqueeze(0)


def output_size(
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Pair:
    """P and Q of a pooling with these windows."""
    sizes = []
    for axis in (0, 1):
        size, pad, step = x.shape[2 + axis], padding[axis], stride[axis]
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        out = (size + 2 * pad - reach + (step - 1 if ceil_mode else 0)) // step + 1
        if (
            ceil_mode and (out - 1) * step >= size + pad
        ):  # a window must begin inside the image or its padding before it
            out -= 1
        if out < 1:
            raise RuntimeError(
                f"{op}(): kernel_size {tuple(kernel)} with dilation {tuple(dilation)} is larger than the padded input: "
                f"input {list(x.shape)}, padding {tuple(padding)}"
            )
        sizes.append(out)
    return sizes[0], sizes[1]


def adaptable(input: Tensor) -> bool:
    """Whether adaptive pooling is the kernels'; PyTorch answers for other ranks and empty images in ways of its own."""
    return supported(input) and input.dim() in (3, 4) and 0 not in input.shape[-2:]


def adaptive_by_pytorch(op: str, input: Tensor, *args: Any) -> Any:
    """PyTorch's answer; its error for a wrong shape, where it has one, with the argument's name."""
    try:
        return getattr(torch.nn.functional, op)(input, *args)
    except (RuntimeError, ValueError) as error:
        if input.dim() in (3, 4):
            raise
        raise type(error)(
            f"{op}(): expected input of shape [N, C, H, W] or [C, H, W], but got {list(input.shape)}"
        ) from error


def adaptive_size(op: str, input: Tensor, size: Any) -> list[int]:
    """P and Q of an adaptive pooling."""
    own = input.shape[-2:]
    if is_int(size):
        sizes: list[Any] = [size, size]
    elif isinstance(size, Sequence) and not isinstance(size, str):
        if len(size) >= max(input.dim(), 3):  # what PyTorch's way of filling in None makes of it
            raise ValueError(f"{op}(): argument 'output_size' must be an int or two ints, but got {size!r}")
        if len(size) != 2:
            raise RuntimeError(f"{op}(): argument 'output_size' must be an int or two ints, but got {size!r}")
        sizes = [o if s is None else s for o, s in zip(own, size, strict=len(own) == 2)]
    else:
        sizes = [None, None]
    if not all(is_int(s) for s in sizes):
        raise TypeError(f"{op}(): argument 'output_size' must be an int or two ints or None, but got {size!r}")
    sizes = [s if isinstance(s, torch.SymInt) else operator.index(s) for s in sizes]
    if min(sizes) < 0:
        raise RuntimeError(f"{op}(): output_size must not be negative, but got {size!r}")
    # Also keeps (i + 1) * H, from which windows follow, within 64 bits. While compiling, a symbolic size must not get a
    # bound from this.
    images = 1 if torch.compiler.is_compiling() else max(math.prod(input.shape[:-2]), 1)
    if max(sizes) >= 2**31 or sizes[0] * sizes[1] * images >= 2**59:
        raise RuntimeError(f"{op}(): output_size {size!r} is too large for input {list(input.shape)}")
    return sizes


def adaptive_images(op: str, input: Tensor, channels_too: bool) -> Tensor:
    """The input as [N, C, H, W], H and W not empty, nor C where PyTorch says so."""
    checked = input.shape[1:] if channels_too else input.shape[-2:]
    if input.dim() not in (3, 4) or 0 in checked:
        raise RuntimeError(
            f"{op}(): expected input of shape [N, C, H, W] or [C, H, W] with non-empty {'C, ' * channels_too}H and W, "
            f"but got {list(input.shape)}"
        )
    return input if input.dim() == 4 else input.contiguous().unsqueeze(0)


__all__ = [
    "Pair",
    "adaptable",
    "adaptive_by_pytorch",
    "adaptive_images",
    "adaptive_size",
    "as_images",
    "check_bool",
    "is_int",
    "output_size",
    "plane_fits",
    "pool_pair",
    "takes_over",
    "window",
]
