"""What the pooling operators share: arguments, output sizes and their errors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._core import pair


def window(
    op: str, kernel_size: int | Sequence[int], stride: int | Sequence[int] | None, padding: int | Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and padding as pairs, checked."""
    kernel = pair(kernel_size, "kernel_size", op)
    step = kernel if stride is None or stride == [] else pair(stride, "stride", op)
    pad = pair(padding, "padding", op)
    if min(kernel) <= 0:
        raise RuntimeError(f"{op}(): kernel_size must be positive, but got {kernel}")
    if min(step) <= 0:
        raise RuntimeError(f"{op}(): stride must be positive, but got {step}")
    if min(pad) < 0:
        raise RuntimeError(f"{op}(): padding must not be negative, but got {pad}")
    if pad[0] > kernel[0] // 2 or pad[1] > kernel[1] // 2:
        raise RuntimeError(
            f"{op}(): padding must be at most half of kernel_size, but got padding {pad} and kernel_size {kernel}"
        )
    return kernel, step, pad


def as_images(op: str, input: Tensor) -> Tensor:
    """The input as [N, C, H, W]; only N may be empty."""
    if input.dim() not in (3, 4) or any(size == 0 for size in input.shape[-3:]):
        raise RuntimeError(
            f"{op}(): expected input of shape [N, C, H, W] or [C, H, W] with non-empty C, H and W, "
            f"but got {list(input.shape)}"
        )
    return input if input.dim() == 4 else input.unsqueeze(0)


def output_size(
    op: str,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int]:
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
                f"{op}(): the kernel of {tuple(kernel)} with dilation {tuple(dilation)} is larger than the padded "
                f"input: input {list(x.shape)}, padding {tuple(padding)}"
            )
        sizes.append(out)
    return sizes[0], sizes[1]


__all__ = ["as_images", "output_size", "window"]
