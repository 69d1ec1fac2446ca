"""Routing PyTorch's own functions to cnnops while a block runs: :func:`patch_aten`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import functional as CF
from .ops._core import pair, transparent


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    # PyTorch refuses some words for the padding that cnnops.functional takes.
    words = ("valid", "same") if pair(stride, "stride", "conv2d") == (1, 1) else ("valid",)
    function = torch.conv2d if isinstance(padding, str) and padding not in words else CF.conv2d
    return function(input, weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(*args: Any, **kwargs: Any) -> Any:
    return CF.conv_transpose2d(*args, **kwargs)


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    return CF.max_pool2d(input, kernel_size, _stride(stride), padding, dilation, ceil_mode, return_indices)


def _max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = True,
) -> Any:
    return CF.max_pool2d(input, kernel_size, _stride(stride), padding, dilation, ceil_mode, True)


def _avg_pool2d(input: Tensor, kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any) -> Any:
    return CF.avg_pool2d(input, kernel_size, _stride(stride), *args, **kwargs)


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Any:
    return CF.adaptive_avg_pool2d(input, output_size)


def _adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    return CF.adaptive_max_pool2d(input, output_size, return_indices)


def _adaptive_max_pool2d_with_indices(input: Tensor, output_size: Any, return_indices: bool = True) -> Any:
    return CF.adaptive_max_pool2d(input, output_size, True)


def _batch_norm(*args: Any, **kwargs: Any) -> Any:
    return CF.batch_norm(*args, **kwargs)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    # Below F.batch_norm, PyTorch does not refuse eps <= 0 and one value per channel; the functions of cnnops do.
    if input.dim() >= 2 and eps > 0 and not (training and input.numel() == input.shape[1]):
        return CF.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)


def _stride(stride: Any) -> Any:
    """Below torch.nn.functional, an empty tuple stands for no stride."""
    return None if stride is None or (isinstance(stride, (tuple, list)) and not stride) else stride


_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _conv2d,  # F.conv2d is the same object
    torch.conv_transpose2d: _conv_transpose2d,
    torch.max_pool2d: _max_pool2d,
    F.max_pool2d: _max_pool2d,
    F.max_pool2d_with_indices: _max_pool2d_with_indices,
    torch._C._nn.max_pool2d_with_indices: _max_pool2d_with_indices,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch._C._nn.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.adaptive_max_pool2d: _adaptive_max_pool2d,
    F.adaptive_max_pool2d_with_indices: _adaptive_max_pool2d_with_indices,
    torch._C._nn.adaptive_max_pool2d: _adaptive_max_pool2d_with_indices,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
}


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        route = _ROUTES.get(func)
        # Subclasses of Tensor that override PyTorch's functions have the first say.
        if route is None or "out" in kwargs or not all(map(transparent, types)):
            return func(*args, **kwargs)
        return route(*args, **kwargs)


@contextmanager
def patch_aten() -> Iterator[None]:
    """Routes PyTorch's own convolution, pooling and batch normalization to cnnops while the block runs.

    For models that call functions instead of layers, or that must not be changed. Routed are ``conv2d``,
    ``conv_transpose2d``, ``max_pool2d``, ``avg_pool2d``, ``adaptive_avg_pool2d``, ``adaptive_max_pool2d`` (the latter
    and ``max_pool2d`` also with indices) and ``batch_norm``, from ``torch.nn.functional`` and from ``torch``, and so
    torch.nn's layers. Not routed: ``torch.ops.aten.*`` called by name, and TorchScript, which never calls Python. What
    the kernels do not take (a device, a dtype) is left to PyTorch.

    At the block's end everything is as before, also when it ends by an exception. Blocks may be nested; the inner one
    changes nothing. The block holds for the thread that entered it: not for threads that it starts (``DataParallel``),
    nor for other threads. Gradients need not be taken inside: what the forward pass recorded is cnnops's either way.
    ``torch.compile`` called inside sees the routed model.

    It is a ``torch.overrides.TorchFunctionMode``, which each call of a PyTorch function passes: about 1 µs more per
    call inside the block. :func:`cnnops.convert_` costs nothing.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.MaxPool2d(2))
        >>> with cnnops.patch_aten():
        ...     y = model(torch.randn(1, 3, 10, 10))
        >>> y.shape
        torch.Size([1, 8, 4, 4])
    """
    if any(isinstance(mode, _Mode) for mode in _get_current_function_mode_stack()):
        yield
        return
    with _Mode():
        yield


__all__ = ["patch_aten"]
