"""The layers: :mod:`torch.nn`'s own, computing with :mod:`cnnops.functional`, and what it does not have.

Where torch.nn has a layer of the same name, this one is a subclass of it with the same parameters, buffers and
attributes, so that a ``state_dict`` goes either way and ``isinstance`` still holds. Nothing is set up in a constructor
that the methods need: an instance whose ``__class__`` is exchanged (:func:`cnnops.convert_`) is a whole layer.

``torch.fx`` sees these layers as leaves, as it does torch.nn's. TorchScript cannot compile them (it traces them as
PyTorch's ops): call :func:`cnnops.revert_` first.

All images are ``[N, C, H, W]`` or ``[C, H, W]`` (:class:`BatchNorm2d`: the former alone), contiguous or channels_last.

The examples assume:

    >>> import torch
    >>> from cnnops import nn
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter

from . import functional as CF
from .ops._activation import index as _check_activation
from .ops._core import POOLED_BYTES, is_compiling, pair
from .ops._padding import resolve
from .ops.activation import activation_layer

_Ints = int | Sequence[int]


def _leaf(module: torch.nn.Module, input: Proxy, *args: Any) -> Proxy:
    """Records the layer in a graph of ``torch.fx``, whose tracer enters all modules but those of ``torch.nn``."""
    tracer: Any = input.tracer
    while args and args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), {})


class Conv2d(torch.nn.Conv2d):
    """2-D convolution: :class:`torch.nn.Conv2d` with more paddings and a fused last step.

    ``y = activation(conv(input, weight) + bias + residual)``

    Args:
        in_channels, out_channels: C and K; ``groups`` divides both.
        kernel_size: of the filters, in pixels, an int or a pair (height, width).
        stride, dilation: in pixels, an int or a pair.
        padding: pixels on each side, an int or a pair; or ``"valid"``: none; ``"same"``: so many that the output
            measures ``ceil(input / stride)``, an odd one at the bottom or right;
            ``"full"``: ``dilation * (kernel_size - 1)``.
        groups: channels fall into this many groups, each with filters of its own.
        bias: whether to add a learned number to each output channel.
        padding_mode: what the padding holds: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device, dtype: of the parameters.
        activation: None, or a name as in :func:`cnnops.functional.conv2d`.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - residual (optional second argument of the call): as the output
        - output: ``[N, K, P, Q]`` or ``[K, P, Q]``
        - ``weight``: ``[K, C / groups, R, S]``, ``bias``: ``[K]``

    Raises:
        ValueError: an impossible combination of arguments.
        TypeError, ValueError or RuntimeError: in the call, as PyTorch.

    Example:
        >>> layer = nn.Conv2d(3, 8, 5, stride=2, padding="same", activation="relu")
        >>> layer(torch.randn(1, 3, 31, 31)).shape
        torch.Size([1, 8, 16, 16])
    """

    activation: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Ints,
        stride: _Ints = 1,
        padding: _Ints | str = 0,
        dilation: _Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        # torch.nn.Conv2d refuses these two, so it is told of another padding first.
        beyond = padding == "full" or (padding == "same" and pair(stride, "stride", "Conv2d") != (1, 1))
        arguments: tuple[Any, ...] = (kernel_size, stride, "valid" if beyond else padding, dilation)
        super().__init__(in_channels, out_channels, *arguments, groups, bias, padding_mode, device, dtype)  # type: ignore
        if beyond:
            self.padding = padding  # type: ignore[assignment]
        if activation is not None:
            _check_activation("Conv2d", activation)
            self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input, residual)
        return self._conv_forward(input, self.weight, self.bias, residual)

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            sides: Sequence[int] = self._reversed_padding_repeated_twice
            if padding == "full" or (padding == "same" and self.stride != (1, 1)):
                top, bottom, left, right = resolve(
                    "Conv2d", padding, input.shape[-2:], self.kernel_size, self.stride, self.dilation
                )
                sides = (left, right, top, bottom)
            input, padding = F.pad(input, sides, mode=self.padding_mode), 0
        return CF.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self.activation,
            residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _show_activation(self.activation)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """2-D transposed convolution: :class:`torch.nn.ConvTranspose2d`, of which it takes every argument.

    Args:
        in_channels, out_channels: C and K; ``groups`` divides both.
        kernel_size, stride, padding, dilation: of the convolution of which this is the gradient, an int or a pair.
        output_padding: rows and columns added at the bottom and right, less than stride or dilation.
        groups, bias, device, dtype: as of :class:`Conv2d`.
        padding_mode: ``"zeros"`` only, as in torch.nn.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, K, P, Q]`` or ``[K, P, Q]`` with
          ``P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1``; the call's second argument,
          ``output_size``, chooses another ``output_padding``
        - ``weight``: ``[C, K / groups, R, S]``, ``bias``: ``[K]``

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> layer = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
        >>> layer(torch.randn(1, 4, 8, 8), output_size=(16, 16)).shape
        torch.Size([1, 2, 16, 16])
    """

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input, output_size)
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for ConvTranspose2d")
        output_padding = self._output_padding(
            input,
            output_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return CF.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """Maximum pooling: :class:`torch.nn.MaxPool2d`, of which it takes every argument.

    Args:
        kernel_size, stride, padding, dilation: in pixels, an int or a pair; stride is kernel_size by default; padding
            is at most half the kernel.
        return_indices: also return where each maximum lies in its plane, ``h * W + w``.
        ceil_mode: round the output size up.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, C, P, Q]`` or ``[C, P, Q]`` with
          ``P = (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1``

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> nn.MaxPool2d(3, stride=2, padding=1)(torch.randn(1, 4, 16, 16)).shape
        torch.Size([1, 4, 8, 8])
    """

    def forward(self, input: Tensor) -> Any:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        return CF.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Mean pooling: :class:`torch.nn.AvgPool2d`, of which it takes every argument.

    Args:
        kernel_size, stride, padding: in pixels, an int or a pair; stride is kernel_size by default; padding is at most
            half the kernel.
        ceil_mode: round the output size up.
        count_include_pad: whether the mean counts the zeros of the padding.
        divisor_override: divide by this instead of by the number of cells.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, C, P, Q]`` or ``[C, P, Q]``, ``P = (H + 2 * padding - kernel) // stride + 1``

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> nn.AvgPool2d(2)(torch.ones(1, 4, 16, 16)).shape
        torch.Size([1, 4, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        return CF.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class MedianPool2d(torch.nn.Module):
    """Median pooling: the median of each window, the lower of the middle two of an even count (as ``torch.median``).

    Args:
        kernel_size, stride, padding, dilation: in pixels, an int or a pair; stride is kernel_size by default; padding
            is at most half the kernel, and its cells take no part.
        ceil_mode: round the output size up.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, C, P, Q]`` or ``[C, P, Q]`` with
          ``P = (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1``

    A NaN in a window gives NaN. The gradient goes to the chosen element, the first in row-major order among equals.

    Raises:
        TypeError, ValueError or RuntimeError, as the other poolings.

    Example:
        >>> nn.MedianPool2d(3, stride=1, padding=1)(torch.randn(1, 4, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    def __init__(
        self,
        kernel_size: _Ints,
        stride: _Ints | None = None,
        padding: _Ints = 0,
        dilation: _Ints = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        return CF.median_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"ceil_mode={self.ceil_mode}"
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """Mean pooling to a given size: :class:`torch.nn.AdaptiveAvgPool2d`.

    Args:
        output_size: P and Q, an int or a pair; None in a pair keeps the input's size.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, C, P, Q]`` or ``[C, P, Q]``; row p is the mean of rows ``floor(p * H / P)`` up to, not
          including, ``ceil((p + 1) * H / P)``

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> nn.AdaptiveAvgPool2d(1)(torch.ones(2, 4, 7, 7)).shape
        torch.Size([2, 4, 1, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        return CF.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """Maximum pooling to a given size: :class:`torch.nn.AdaptiveMaxPool2d`.

    Args:
        output_size: P and Q, an int or a pair; None in a pair keeps the input's size.
        return_indices: also return where each maximum lies in its plane, ``h * W + w``.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``
        - output: ``[N, C, P, Q]`` or ``[C, P, Q]``, windows as of :class:`AdaptiveAvgPool2d`

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> nn.AdaptiveMaxPool2d((3, None))(torch.randn(2, 4, 7, 5)).shape
        torch.Size([2, 4, 3, 5])
    """

    def forward(self, input: Tensor) -> Any:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        return CF.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """Batch normalization: :class:`torch.nn.BatchNorm2d` with a fused last step.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, mean and (biased) variance per channel:
    in training of the batch, in evaluation the running ones (Ioffe and Szegedy, arXiv 1502.03167).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the weight of the batch in the running statistics, which take the unbiased variance; None: they are
            the mean over all batches so far.
        affine: whether there are a weight and a bias to learn.
        track_running_stats: whether there are running statistics; without, evaluation takes the batch's, too.
        device, dtype: of parameters and buffers.
        activation: None, or a name as in :func:`cnnops.functional.conv2d`.
        options: further keywords of the installed torch.nn.BatchNorm2d.

    Shape:
        - input: ``[N, C, H, W]``
        - residual (optional second argument of the call) and output: as the input
        - ``weight``, ``bias``, ``running_mean``, ``running_var``: ``[C]``

    Raises:
        ValueError: an input that is not 4-D, or one value per channel in training.
        TypeError or RuntimeError, as PyTorch.

    Example:
        >>> x, shortcut = torch.randn(2, 8, 4, 5, 5)
        >>> nn.BatchNorm2d(4, activation="relu")(x, shortcut).min() >= 0
        tensor(True)
    """

    activation: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        if activation is not None:
            _check_activation("BatchNorm2d", activation)
            self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input, residual)
        self._check_input_dim(input)
        tracked = self.num_batches_tracked if self.training and self.track_running_stats else None
        momentum = self.momentum
        if momentum is None:  # the mean over all batches
            momentum = 0.0 if tracked is None else 1.0 / (float(tracked) + 1.0)
        running = not self.training or self.track_running_stats
        y = CF.batch_norm(
            input,
            self.running_mean if running else None,
            self.running_var if running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
        )
        if tracked is not None:  # after the call: a batch that was refused does not count
            tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        return super().extra_repr() + _show_activation(self.activation)


class LocallyConnected2d(torch.nn.Module):
    """A convolution whose filters are not shared: every output position has its own.

    Args:
        in_channels, out_channels: C and K.
        input_size: H and W in pixels, an int or a pair: with them the number of filters is fixed.
        kernel_size, stride, padding, dilation: in pixels, an int or a pair; padding also ``"valid"``, ``"same"`` or
            ``"full"``, as in :class:`Conv2d`.
        bias: whether to add a learned number to each output element.
        padding_mode: what the padding holds: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device, dtype: of the parameters.

    Shape:
        - input: ``[N, C, H, W]`` or ``[C, H, W]``, of the size given
        - output: ``[N, K, P, Q]`` or ``[K, P, Q]``
        - ``weight``: ``[P, Q, K, C, R, S]``, ``bias``: ``[K, P, Q]``; both start uniform in ``±1 / sqrt(C * R * S)``,
          as those of :class:`torch.nn.Conv2d` do

    Raises:
        ValueError: an impossible combination of arguments.
        TypeError, ValueError or RuntimeError: in the call, for an input that does not fit.

    Example:
        >>> layer = nn.LocallyConnected2d(3, 8, input_size=16, kernel_size=3, stride=2, padding=1)
        >>> layer(torch.randn(1, 3, 16, 16)).shape, layer.weight.shape
        (torch.Size([1, 8, 8, 8]), torch.Size([8, 8, 8, 3, 3, 3]))
    """

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: _Ints,
        kernel_size: _Ints,
        stride: _Ints = 1,
        padding: _Ints | str = 0,
        dilation: _Ints = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        modes = ("zeros", "reflect", "replicate", "circular")
        if padding_mode not in modes:
            raise ValueError(f"LocallyConnected2d: padding_mode must be one of {modes}, but got {padding_mode!r}")
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"LocallyConnected2d: in_channels and out_channels must be positive, but got {in_channels} and "
                f"{out_channels}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size = pair(input_size, "input_size", "LocallyConnected2d")
        self.kernel_size = pair(kernel_size, "kernel_size", "LocallyConnected2d")
        self.stride = pair(stride, "stride", "LocallyConnected2d")
        self.dilation = pair(dilation, "dilation", "LocallyConnected2d")
        self.padding_mode = padding_mode
        if min(*self.input_size, *self.kernel_size, *self.stride, *self.dilation) < 1:
            raise ValueError(
                f"LocallyConnected2d: sizes must be positive, but got input_size {self.input_size}, kernel_size "
                f"{self.kernel_size}, stride {self.stride}, dilation {self.dilation}"
            )
        self.padding: Any = padding if isinstance(padding, str) else pair(padding, "padding", "LocallyConnected2d")
        top, bottom, left, right = sides = self._sides()
        self.output_size = tuple(
            (size + pad - d * (k - 1) - 1) // s + 1
            for size, pad, d, k, s in zip(
                self.input_size, (top + bottom, left + right), self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        if min(self.output_size) < 1:
            raise ValueError(
                f"LocallyConnected2d: the kernel of {self.kernel_size} with dilation {self.dilation} is larger than "
                f"the padded input: input_size {self.input_size}, padding {sides} (top, bottom, left, right)"
            )
        shape = (*self.output_size, out_channels, in_channels, *self.kernel_size)
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(out_channels, *self.output_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _sides(self) -> tuple[int, int, int, int]:
        return resolve(
            "LocallyConnected2d", self.padding, self.input_size, self.kernel_size, self.stride, self.dilation
        )

    def reset_parameters(self) -> None:
        """Draws weight and bias anew."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters(recurse=False):
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        padding = self.padding
        if self.padding_mode != "zeros":
            top, bottom, left, right = self._sides()
            input, padding = F.pad(input, (left, right, top, bottom), mode=self.padding_mode), 0
        return CF.locally_connected2d(input, self.weight, self.bias, self.stride, padding, self.dilation)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        if self.padding not in ("valid", (0, 0)):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return text


class _PooledActivation(torch.nn.Module):
    """Goes before PyTorch's layer among the bases of a class."""

    _activation: str

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input)
        # For a small image even to look further would take longer than the layer.
        if type(input) is Tensor and not is_compiling() and input.numel() * input.element_size() >= POOLED_BYTES:
            y = None
            if getattr(self, "approximate", "none") == "none":
                y = activation_layer(self._activation, input, getattr(self, "inplace", False))
            if y is not None:
                return y
        return super().forward(input)


class ReLU(_PooledActivation, torch.nn.ReLU):
    """``max(x, 0)``: :class:`torch.nn.ReLU`.

    Computed by PyTorch; large results and gradients are in pooled memory (:mod:`cnnops.memory`).

    Args:
        inplace: whether the result takes the place of the input.

    Shape:
        - input and output: the same, any

    Raises:
        RuntimeError or NotImplementedError, as PyTorch.

    Example:
        >>> nn.ReLU()(torch.tensor([-1.0, 0.0, 8.0]))
        tensor([0., 0., 8.])
    """

    _activation = "relu"


class ReLU6(_PooledActivation, torch.nn.ReLU6):
    """``min(max(x, 0), 6)``: :class:`torch.nn.ReLU6`.

    Computed by PyTorch; large results and gradients are in pooled memory (:mod:`cnnops.memory`).

    Args:
        inplace: whether the result takes the place of the input.

    Shape:
        - input and output: the same, any

    Raises:
        RuntimeError or NotImplementedError, as PyTorch.

    Example:
        >>> nn.ReLU6()(torch.tensor([-1.0, 0.0, 8.0]))
        tensor([0., 0., 6.])
    """

    _activation = "relu6"


class SiLU(_PooledActivation, torch.nn.SiLU):
    """``x * sigmoid(x)``: :class:`torch.nn.SiLU`.

    Computed by PyTorch; large results and gradients are in pooled memory (:mod:`cnnops.memory`).

    Args:
        inplace: whether the result takes the place of the input.

    Shape:
        - input and output: the same, any

    Raises:
        RuntimeError or NotImplementedError, as PyTorch.

    Example:
        >>> nn.SiLU()(torch.tensor([-1.0, 0.0, 8.0]))
        tensor([-0.2689,  0.0000,  7.9973])
    """

    _activation = "silu"


class Hardswish(_PooledActivation, torch.nn.Hardswish):
    """``x * min(max(x + 3, 0), 6) / 6``: :class:`torch.nn.Hardswish`.

    Computed by PyTorch; large results and gradients are in pooled memory (:mod:`cnnops.memory`).

    Args:
        inplace: whether the result takes the place of the input.

    Shape:
        - input and output: the same, any

    Raises:
        RuntimeError or NotImplementedError, as PyTorch.

    Example:
        >>> nn.Hardswish()(torch.tensor([-1.0, 0.0, 8.0]))
        tensor([-0.3333,  0.0000,  8.0000])
    """

    _activation = "hardswish"


class GELU(_PooledActivation, torch.nn.GELU):
    """``x * Phi(x)``, with the normal distribution's cumulative function: :class:`torch.nn.GELU`.

    Computed by PyTorch; large results and gradients are in pooled memory (:mod:`cnnops.memory`).

    Args:
        approximate: ``"none"``, or ``"tanh"`` for the formula with it, which is PyTorch's own here.

    Shape:
        - input and output: the same, any

    Raises:
        RuntimeError or NotImplementedError, as PyTorch.

    Example:
        >>> nn.GELU()(torch.tensor([-1.0, 0.0, 8.0]))
        tensor([-0.1587,  0.0000,  8.0000])
    """

    _activation = "gelu"


def _show_activation(activation: str | None) -> str:
    return "" if activation is None else f", activation={activation}"


__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Hardswish",
    "LocallyConnected2d",
    "MaxPool2d",
    "MedianPool2d",
    "ReLU",
    "ReLU6",
    "SiLU",
]
