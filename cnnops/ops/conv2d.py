"""Convolution, transposed convolution and their gradients (contract: ``csrc/ops/conv2d.h``).

Three bilinear operators, each the derivative of the others, so derivatives of any order are right:

* ``conv2d``             y  = x * w      (forward)
* ``conv2d_input_grad``  dx = dy * w'    (also the forward of the transposed convolution)
* ``conv2d_weight_grad`` dw = dy * x

Padding is four numbers throughout: top, bottom, left, right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _activation
from ._core import C, Operator, applier, dense, direct, empty, memory_format, needs_composite, pair, supported, threads
from ._padding import resolve


def output_size(
    h: int, w: int, r: int, s: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """P and Q."""
    return (
        (h + padding[0] + padding[1] - dilation[0] * (r - 1) - 1) // stride[0] + 1,
        (w + padding[2] + padding[3] - dilation[1] * (s - 1) - 1) // stride[1] + 1,
    )


def _format(*images: Tensor) -> torch.memory_format:
    """channels_last where any of them is, as PyTorch decides for the image and the weight."""
    if any(memory_format(t) is torch.channels_last for t in images):
        return torch.channels_last
    return torch.contiguous_format


# Precision in the contract. "none" is PyTorch's word for what is not set: full precision.
_PRECISIONS = {"none": 0, "ieee": 0, "tf32": 1, "bf16": 2}
_precision_setting: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)


def precision(backend: str = "mkldnn") -> int:
    """How exact products of float32 numbers must be where 16-bit matrix instructions compute them.

    PyTorch's own setting for convolutions, ``torch.backends.mkldnn.conv.fp32_precision`` on CPUs and
    ``torch.backends.cudnn.conv.fp32_precision`` (backend ``cuda``) on CUDA devices.
    """
    return _PRECISIONS.get(_precision_setting(backend, "conv"), 0) if _precision_setting else 0


def _precision(t: Tensor) -> int:
    return precision("mkldnn" if t.is_cpu else "cuda")


# ---- y = x * w -------------------------------------------------------------------------------------------------------


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: int,
) -> Tensor:  # fmt: skip
    y = _fake(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    if y.numel():
        format = _format(x, weight)
        C.conv2d_forward(
            y, dense(x, format), weight, None if bias is None else bias.contiguous(),
            None if residual is None else dense(residual, format), stride, padding[::2], dilation, groups, activation,
            threads(), _precision(x),
        )  # fmt: skip
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: int,
) -> Tensor:  # fmt: skip
    p, q = output_size(x.shape[2], x.shape[3], weight.shape[2], weight.shape[3], stride, padding, dilation)
    return empty((x.shape[0], weight.shape[0], p, q), x, _format(x, weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, *ctx.geometry, activation = inputs
    if activation or residual is not None:
        raise NotImplementedError(
            "cnnops::conv2d: activation and residual are fused for inference; cnnops.functional.conv2d takes the "
            "differentiable way around"
        )
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    dx = conv2d_input_grad(dy, weight, None, x.shape[2], x.shape[3], *geometry) if wanted[0] else None
    dw = None
    if wanted[1]:
        dw = conv2d_weight_grad(
            dy, x, weight.shape[2], weight.shape[3], *geometry, memory_format(weight) is torch.channels_last
        )
    return dx, dw, conv2d_bias_grad(dy) if wanted[2] else None


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    wanted = *ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]
    return *_gradients(dy, x, weight, ctx.geometry, wanted), *[None] * 6


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What autograd computes of a plain convolution, geometry as the user gave it: dx, dw and db, where wanted."""
    if not torch.is_grad_enabled() and direct():
        made = C.conv2d_backward_direct(
            dy, x, weight, stride, padding, dilation, groups, wanted[0], wanted[1], wanted[2], threads(), precision()
        )  # fmt: skip
        if made is not None:
            return made
    return _gradients(dy, x, weight, _geometry("conv2d", stride, padding, dilation, groups), wanted)


def _transposed_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The same of a transposed convolution."""
    if not torch.is_grad_enabled() and direct():
        made = C.conv_transpose2d_backward_direct(
            dy, x, weight, stride, padding, dilation, groups, wanted[0], wanted[1], wanted[2], threads(), precision()
        )  # fmt: skip
        if made is not None:
            return made
    geometry = _geometry("conv_transpose2d", stride, padding, dilation, groups)
    return _input_grad_gradients(dy, x, weight, geometry, wanted)


def _geometry(op: str, stride: Any, padding: Any, dilation: Any, groups: int) -> list[Any]:
    top, left = pair(padding, "padding", op)
    return [pair(stride, "stride", op), (top, top, left, left), pair(dilation, "dilation", op), groups]


def _recorder(name: str, gradients: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Tensor]:
    """A function that gives a result, which the extension has computed already, its derivatives: of the input, weight,
    bias, that result in a tuple, and the geometry as the user gave it."""

    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: tuple[Tensor], geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return y[0]

    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx, dw, db = gradients(dy, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad)
        return dx, dw, db, None, None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return applier(type(name, (torch.autograd.Function,), members))


_record = _recorder("conv2d", gradients)
_record_transposed = _recorder("conv2d_input_grad", _transposed_gradients)


def _flops(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    k, c, r, s = weight
    n, _, p, q = out_shape
    return 2 * n * k * p * q * c * r * s


conv2d_op = Operator(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, SymInt[4] padding, "
    "int[2] dilation, int groups, int activation) -> Tensor",
    _kernel, _fake, setup_context=_setup, backward=_backward, foldable=(0, 3), flops=_flops, autocast=(0, 1, 2, 3),
)  # fmt: skip


# ---- dx = dy * w' ----------------------------------------------------------------------------------------------------


def _input_grad_kernel(
    dy: Tensor, weight: Tensor, bias: Tensor | None, h: int, w: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    dx = _input_grad_fake(dy, weight, bias, h, w, stride, padding, dilation, groups)
    if dx.numel():
        dy = dense(dy, _format(dy, weight))
        bias = None if bias is None else bias.contiguous()
        C.conv2d_input_grad(dx, dy, weight, bias, stride, padding[::2], dilation, groups, threads(), _precision(dy))
    return dx


def _input_grad_fake(
    dy: Tensor, weight: Tensor, bias: Tensor | None, h: int, w: int, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    return empty((dy.shape[0], weight.shape[1] * groups, h, w), dy, _format(dy, weight))


def _input_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, bias, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(dy, weight)
    ctx.has_bias = bias is not None


def _input_grad_gradients(
    ddx: Tensor, dy: Tensor, weight: Tensor, geometry: Sequence[Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    ddy = conv2d_op(ddx, weight, None, None, *geometry, 0) if wanted[0] else None
    dw = None
    if wanted[1]:
        dw = conv2d_weight_grad(
            dy, ddx, weight.shape[2], weight.shape[3], *geometry, memory_format(weight) is torch.channels_last
        )
    return ddy, dw, conv2d_bias_grad(ddx) if wanted[2] else None


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, weight = ctx.saved_tensors
    wanted = *ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]
    return *_input_grad_gradients(ddx, dy, weight, ctx.geometry, wanted), *[None] * 6


def _input_grad_flops(dy: Any, weight: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    n, _, p, q = dy
    k, c, r, s = weight
    return 2 * n * k * p * q * c * r * s


conv2d_input_grad = Operator(
    "conv2d_input_grad(Tensor dy, Tensor weight, Tensor? bias, SymInt h, SymInt w, int[2] stride, SymInt[4] padding, "
    "int[2] dilation, int groups) -> Tensor",
    _input_grad_kernel, _input_grad_fake, setup_context=_input_grad_setup, backward=_input_grad_backward, foldable=(0,),
    flops=_input_grad_flops, autocast=(0, 1, 2),
)  # fmt: skip


# ---- dw = dy * x -----------------------------------------------------------------------------------------------------


def _weight_grad_kernel(
    dy: Tensor, x: Tensor, r: int, s: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    dw = _weight_grad_fake(dy, x, r, s, stride, padding, dilation, groups, channels_last)
    if dw.numel():
        format = _format(x, dy)
        C.conv2d_weight_grad(
            dw, dense(dy, format), dense(x, format), stride, padding[::2], dilation, groups, threads(), _precision(x)
        )
    return dw


def _weight_grad_fake(
    dy: Tensor, x: Tensor, r: int, s: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    format = torch.channels_last if channels_last else torch.contiguous_format
    return empty((dy.shape[1], x.shape[1] // groups, r, s), dy, format)


def _weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, _, *ctx.geometry, _ = inputs
    ctx.save_for_backward(dy, x)


def _weight_grad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x = ctx.saved_tensors
    needs = ctx.needs_input_grad
    ddy = conv2d_op(x, ddw, None, None, *ctx.geometry, 0) if needs[0] else None
    dx = conv2d_input_grad(dy, ddw, None, x.shape[2], x.shape[3], *ctx.geometry) if needs[1] else None
    return ddy, dx, *[None] * 7


def _weight_grad_flops(dy: Any, x: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    n, _, p, q = dy
    k, c, r, s = out_shape
    return 2 * n * k * p * q * c * r * s


conv2d_weight_grad = Operator(
    "conv2d_weight_grad(Tensor dy, Tensor x, SymInt r, SymInt s, int[2] stride, SymInt[4] padding, int[2] dilation, "
    "int groups, bool channels_last) -> Tensor",
    _weight_grad_kernel, _weight_grad_fake, setup_context=_weight_grad_setup, backward=_weight_grad_backward,
    flops=_weight_grad_flops,
)  # fmt: skip


# ---- db = sum of dy --------------------------------------------------------------------------------------------------


def _bias_grad_kernel(dy: Tensor) -> Tensor:
    if not dy.numel():
        return dy.new_zeros(dy.shape[1])
    db = dy.new_empty(dy.shape[1])
    C.conv2d_bias_grad(db, dense(dy, memory_format(dy)), threads())
    return db


def _bias_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _bias_grad_backward(ctx: Any, ddb: Tensor) -> Tensor:
    return ddb[None, :, None, None].expand(ctx.shape)


conv2d_bias_grad = Operator(
    "conv2d_bias_grad(Tensor dy) -> Tensor",
    _bias_grad_kernel, lambda dy: dy.new_empty(dy.shape[1]),
    setup_context=_bias_grad_setup, backward=_bias_grad_backward,
)  # fmt: skip


# ---- The functions ---------------------------------------------------------------------------------------------------


def _check(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, in_channels: int, out_channels: int,
    stride: Sequence[int], dilation: Sequence[int], groups: int,
) -> None:  # fmt: skip
    shapes = f"input {list(input.shape)} and weight {list(weight.shape)}"
    if weight.dim() != 4:
        raise RuntimeError(f"{op}(): expected weight with 4 dimensions, but its shape is {list(weight.shape)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{op}(): expected input of shape [N, C, H, W] or [C, H, W], but got {list(input.shape)}")
    if groups <= 0:
        raise RuntimeError(f"{op}(): groups must be positive, but got {groups}")
    if min(stride) <= 0:
        raise RuntimeError(f"{op}(): stride must be positive, but got {tuple(stride)}")
    if min(dilation) <= 0:
        raise RuntimeError(f"{op}(): dilation must be positive, but got {tuple(dilation)}")
    if min(weight.shape[1:]) == 0 or weight.shape[0] == 0:
        raise RuntimeError(f"{op}(): expected weight without empty dimensions, but its shape is {list(weight.shape)}")
    if weight.shape[0] % groups or weight.shape[0] < groups:
        raise RuntimeError(f"{op}(): groups={groups} must divide the first dimension of weight, {weight.shape[0]}")
    if input.shape[-3] != in_channels:
        raise RuntimeError(f"{op}(): expected input with {in_channels} channels (groups={groups}), but got {shapes}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_channels):
        raise RuntimeError(f"{op}(): expected bias of shape [{out_channels}], but got {list(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != input.dtype:
            raise RuntimeError(f"{op}(): expected {name} in the input's dtype {input.dtype}, but got {t.dtype}")
        if t.device != input.device:
            raise RuntimeError(f"{op}(): expected {name} on the input's device {input.device}, but got {t.device}")


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype, where it is on for the device of the first."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device
        else t
        for t in tensors
    )  # fmt: skip


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """2-D convolution, as :func:`torch.nn.functional.conv2d`, with more paddings and a fused last step.

    ``y = activation(conv(input, weight) + bias + residual)``

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: the filters, ``[K, C / groups, R, S]``.
        bias: ``[K]``.
        stride, dilation: in pixels, an int or a pair (vertical, horizontal).
        padding: pixels of zeros on each side, an int or a pair; or ``"valid"``: none; ``"same"``: so many that the
            output measures ``ceil(input / stride)``, an odd one at the bottom or right (TensorFlow's rule; PyTorch has
            it for stride 1 only); ``"full"``: ``dilation * (kernel - 1)``, so that every input pixel meets every tap.
        groups: channels fall into this many groups, each with filters of its own; ``groups=C`` is depthwise.
        activation: ``relu``, ``relu6``, ``leaky_relu``, ``elu``, ``sigmoid``, ``tanh``, ``softplus``, ``silu``,
            ``hardswish`` or ``gelu``, with PyTorch's default parameters. Fused where no gradient is recorded.
        residual: of the output's shape, added before the activation.

    Returns:
        ``[N, K, P, Q]`` (or ``[K, P, Q]``) in the memory format that PyTorch gives it.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> x, w = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 5, 5)
        >>> conv2d(x, w, stride=2, padding="same", activation="relu").shape
        torch.Size([1, 8, 16, 16])
    """
    act = _activation.index("conv2d", activation) if activation is not None else 0
    if direct():
        y = C.conv2d_direct(
            input, weight, bias, residual, stride, padding, dilation, groups, act, torch.is_grad_enabled(), threads(),
            precision()
        )  # fmt: skip
        if type(y) is tuple:
            y = _record(input, weight, bias, y, (stride, padding, dilation, groups))
            return _finish(y, residual, act) if act or residual is not None else y
        if y is not None:
            return y
    if torch._C._is_any_autocast_enabled():
        input, weight, bias, residual = _autocast(input, weight, bias, residual)  # type: ignore[assignment]
    step, dil = pair(stride, "stride", "conv2d"), pair(dilation, "dilation", "conv2d")
    if not supported(input, weight, bias, residual) or needs_composite(input, weight, bias, residual):
        return _composite(input, weight, bias, step, padding, dil, groups, act, residual)
    _check(
        "conv2d", input, weight, bias, weight.shape[1] * groups if weight.dim() > 1 else 0, weight.shape[0], step, dil,
        groups,
    )  # fmt: skip
    size = input.shape[-2:]
    pad = resolve("conv2d", padding, size, weight.shape[2:], step, dil)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    p, q = output_size(size[0], size[1], weight.shape[2], weight.shape[3], step, pad, dil)
    if p < 1 or q < 1 or min(size) == 0:
        raise RuntimeError(
            f"conv2d(): the kernel of {tuple(weight.shape[2:])} with dilation {dil} is larger than the padded input: "
            f"input {list(input.shape)}, padding {pad} (top, bottom, left, right)"
        )
    expected = (x.shape[0], weight.shape[0], p, q) if input.dim() == 4 else (weight.shape[0], p, q)
    if residual is not None and residual.shape != expected:
        raise RuntimeError(f"conv2d(): expected residual of shape {list(expected)}, but got {list(residual.shape)}")
    if residual is not None and residual.dtype != input.dtype:
        raise RuntimeError(f"conv2d(): expected residual in the input's dtype {input.dtype}, but got {residual.dtype}")
    if (act or residual is not None) and torch.is_grad_enabled():
        # The derivative of the last step is PyTorch's own; fusing it is worth something in inference only.
        y = conv2d_op(x, weight, bias, None, step, pad, dil, groups, 0)
        return _finish(y if input.dim() == 4 else y.squeeze(0), residual, act)
    z = residual if residual is None or input.dim() == 4 else residual.unsqueeze(0)
    y = conv2d_op(x, weight, bias, z, step, pad, dil, groups, act)
    return y if input.dim() == 4 else y.squeeze(0)


def _composite(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: int | Sequence[int] | str,
    dilation: tuple[int, int], groups: int, activation: int, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same by PyTorch's own ops."""
    if isinstance(padding, str) and padding != "valid" and not (padding == "same" and stride == (1, 1)):
        top, bottom, left, right = resolve("conv2d", padding, input.shape[-2:], weight.shape[2:], stride, dilation)
        input, padding = F.pad(input, (left, right, top, bottom)), 0
    return _finish(F.conv2d(input, weight, bias, stride, padding, dilation, groups), residual, activation)


def _finish(y: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    """The last step by PyTorch's own ops."""
    return _activation.apply(y if residual is None else y + residual, activation)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """2-D transposed convolution, as :func:`torch.nn.functional.conv_transpose2d`.

    It is the gradient of :func:`conv2d` with respect to its input (Zeiler et al., "Deconvolutional networks", 2010).

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[C, K / groups, R, S]``.
        bias: ``[K]``.
        stride, padding, dilation: of the convolution of which this is the gradient, an int or a pair.
        output_padding: rows and columns added at the bottom and right of the output, less than stride or dilation.
        groups: as in :func:`conv2d`.

    Returns:
        ``[N, K, P, Q]`` with ``P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1``.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch.

    Example:
        >>> conv_transpose2d(torch.ones(1, 4, 8, 8), torch.ones(4, 2, 2, 2), stride=2).shape
        torch.Size([1, 2, 16, 16])
    """
    name = "conv_transpose2d"
    if direct():
        made = C.conv_transpose2d_direct(
            input, weight, bias, stride, padding, output_padding, groups, dilation, torch.is_grad_enabled(), threads(),
            precision()
        )  # fmt: skip
        if type(made) is tuple:
            return _record_transposed(input, weight, bias, made, (stride, padding, dilation, groups))
        if made is not None:
            return made
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)  # type: ignore[assignment]
    if not supported(input, weight, bias) or needs_composite(input, weight, bias):
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    step, pad, dil = pair(stride, "stride", name), pair(padding, "padding", name), pair(dilation, "dilation", name)
    extra = pair(output_padding, "output_padding", name)
    out_channels = weight.shape[1] * groups if weight.dim() > 1 else 0
    _check(name, input, weight, bias, weight.shape[0], out_channels, step, dil, groups)
    if min(pad) < 0 or min(extra) < 0:
        raise RuntimeError(f"{name}(): padding and output_padding must not be negative, but got {pad} and {extra}")
    if any(e >= max(s, d) for e, s, d in zip(extra, step, dil, strict=True)):
        raise RuntimeError(
            f"{name}(): output_padding must be less than stride or dilation, but got output_padding {extra}, "
            f"stride {step}, dilation {dil}"
        )
    size = [
        (n - 1) * s - 2 * a + d * (k - 1) + e + 1
        for n, s, a, d, k, e in zip(input.shape[-2:], step, pad, dil, weight.shape[2:], extra, strict=True)
    ]
    if min(size) < 1 or min(input.shape[-2:]) == 0:
        raise RuntimeError(
            f"{name}(): the output would be of {size} pixels: input {list(input.shape)}, weight {list(weight.shape)}, "
            f"stride {step}, padding {pad}, output_padding {extra}, dilation {dil}"
        )
    x = input if input.dim() == 4 else input.unsqueeze(0)
    y = conv2d_input_grad(x, weight, bias, *size, step, (pad[0], pad[0], pad[1], pad[1]), dil, groups)
    return y if input.dim() == 4 else y.squeeze(0)
