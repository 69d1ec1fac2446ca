"""Batch normalization with a fused residual and activation (contract: ``csrc/ops/batch_norm.h``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _activation
from ._core import (
    C,
    Operator,
    _plain,
    applier,
    dense,
    direct,
    empty,
    memory_format,
    needs_composite,
    supported,
    threads,
)


def _format(x: Tensor) -> torch.memory_format:
    # Where a tensor is dense both ways (one channel, one pixel), PyTorch's batch_norm calls it contiguous.
    return torch.contiguous_format if x.is_contiguous() else memory_format(x)


def _dense_vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _training_kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = _training_fake(x, weight, bias, residual, eps, activation)
    _forward(y, mean, var, x, weight, bias, residual, True, eps, activation)
    return y, mean, var


def _training_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[1], dtype=torch.float64)
    return empty(x.shape, x, _format(x)), statistics, torch.empty_like(statistics)


def _forward(
    y: Tensor, mean: Tensor, var: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, training: bool, eps: float, activation: int
) -> None:  # fmt: skip
    format = _format(x)
    x = dense(x, format)
    residual = None if residual is None else dense(residual, format)
    C.batch_norm_forward(
        y, mean.contiguous(), var.contiguous(), x, _dense_vector(weight), _dense_vector(bias), residual, training, eps,
        activation, threads()
    )  # fmt: skip


def _training_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, eps, activation = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    _save(ctx, x, y, residual, mean, var, weight, bias, True, eps, activation)


def _save(
    ctx: Any, x: Tensor, y: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, training: bool, eps: float, activation: int
) -> None:  # fmt: skip
    # The activation's derivative is taken at z, which x gives again; with a residual, y (which a following layer keeps
    # anyway) stands for z where it can, and the residual itself need not be kept.
    from_output = residual is not None and activation in _activation.OUTPUT_IS_ENOUGH
    ctx.set_materialize_grads(False)
    ctx.arguments = (training, eps, activation)
    ctx.save_for_backward(
        x,
        y if from_output and activation else None,
        residual if activation and not from_output else None,
        mean, var, weight, bias,
    )  # fmt: skip


def _gradients(
    ctx: Any, dy: Tensor | None, x_at: int, weight_at: int, saved: tuple[Any, ...] | None = None
) -> tuple[Any, Any, Any, Any]:
    if dy is None:
        return None, None, None, None
    x, y, residual, mean, var, weight, bias = ctx.saved_tensors if saved is None else saved
    training, eps, activation = ctx.arguments
    needs = ctx.needs_input_grad
    wants = [needs[x_at], *needs[weight_at : weight_at + 3]]
    passed_on = wants[3] and not activation  # dz is dy then
    wants[3] = wants[3] and not passed_on
    dx = dweight = dbias = dresidual = None
    if any(wants):
        dx, dweight, dbias, dresidual = batch_norm_backward(
            dy, x, y, residual, mean, var, weight, bias, training, eps, activation, wants
        )
    if not wants[3]:
        dresidual = dy if passed_on else None
    return dx if wants[0] else None, dweight if wants[1] else None, dbias if wants[2] else None, dresidual


def _training_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, dy, 0, 1), None, None


batch_norm_training = Operator(
    "batch_norm_training(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation) "
    "-> (Tensor y, Tensor mean, Tensor var)",
    _training_kernel, _training_fake, setup_context=_training_setup, backward=_training_backward,
)  # fmt: skip


def _evaluation_kernel(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    eps: float, activation: int
) -> Tensor:  # fmt: skip
    y = empty(x.shape, x, _format(x))
    if y.numel():
        _forward(y, mean, var, x, weight, bias, residual, False, eps, activation)
    return y


def _evaluation_fake(x: Tensor, *_: Any) -> Tensor:
    return empty(x.shape, x, _format(x))


def _evaluation_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, eps, activation = inputs
    _save(ctx, x, output, residual, mean, var, weight, bias, False, eps, activation)


def _evaluation_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, 0, 3)
    return dx, None, None, dweight, dbias, dresidual, None, None


batch_norm_evaluation = Operator(
    "batch_norm_evaluation(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, int activation) -> Tensor",
    _evaluation_kernel, _evaluation_fake, setup_context=_evaluation_setup, backward=_evaluation_backward,
    foldable=(0, 5),
)  # fmt: skip


def _backward_kernel(
    dy: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, training: bool, eps: float, activation: int, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _backward_fake(dy, x, y, residual, mean, var, weight, bias, training, eps, activation, wants)
    if not x.numel():
        for grad in grads:
            grad.zero_()
        return grads
    format = _format(x)
    dx, dweight, dbias, dresidual = (grad if want else None for grad, want in zip(grads, wants, strict=True))
    C.batch_norm_backward(
        dx, dweight, dbias, dresidual, dense(dy, format), dense(x, format), None if y is None else dense(y, format),
        None if residual is None else dense(residual, format), mean.contiguous(), var.contiguous(),
        _dense_vector(weight), _dense_vector(bias), training, eps, activation, threads()
    )  # fmt: skip
    return grads


def _backward_fake(
    dy: Tensor, x: Tensor, y: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor, weight: Tensor | None,
    bias: Tensor | None, training: bool, eps: float, activation: int, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def vector(want: bool, like: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[1] if want else 0, dtype=x.dtype if like is None else like.dtype)

    dx = empty(x.shape, x, memory_format(x)) if wants[0] else x.new_empty(0)
    dresidual = empty(x.shape, x, _format(x)) if wants[3] else x.new_empty(0)
    return dx, vector(wants[1], weight), vector(wants[2], bias), dresidual


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.arguments = inputs[8:]
    ctx.set_materialize_grads(False)


def _derivative_of_output(y: Tensor, activation: int) -> Tensor:
    """act'(z) from y = act(z), differentiable in y."""
    one, name = torch.ones_like(y), _activation.NAMES[activation]
    if name == "relu":
        return torch.where(y <= 0, 0 * one, one)
    if name == "relu6":
        return torch.where((y <= 0) | (y >= 6), 0 * one, one)
    if name == "leaky_relu":
        return torch.where(y > 0, one, 0.01 * one)
    if name == "elu":
        return torch.where(y < 0, y + 1, one)
    if name == "sigmoid":
        return y * (1 - y)
    if name == "tanh":
        return 1 - y * y
    return torch.where(y > math.log1p(math.exp(20)), one, -torch.expm1(-y))  # softplus


def _backward_backward(ctx: Any, *dgrads: Tensor | None) -> tuple[Any, ...]:
    # By PyTorch's own differentiable formulas: the gradients as a function of what they depend on, and its transpose.
    # mean and var are functions of x in training, so x carries their part.
    dy, x, y, residual, mean, var, weight, bias = ctx.saved_tensors
    training, eps, activation, wants = ctx.arguments
    names = ("dy", "x", "y", "residual", "weight", "bias")
    given = {k: v for k, v in zip(names, (dy, x, y, residual, weight, bias), strict=True) if v is not None}

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        t = dict(zip(given, tensors, strict=True))

        def normalized(*inputs: Tensor) -> Tensor:
            n = dict(zip((k for k in ("x", "weight", "bias") if k in t), inputs, strict=True))
            running = (None, None) if training else (mean, var)
            # weight and bias stay outside: batch_norm's own second derivatives miss a bias without a weight.
            z = F.batch_norm(n["x"], running[0], running[1], None, None, training, 0.0, eps)
            if "weight" in n:
                z = z * n["weight"][:, None, None]
            if "bias" in n:
                z = z + n["bias"][:, None, None]
            return z.to(x.dtype)

        inputs = [t[k] for k in ("x", "weight", "bias") if k in t]
        z, transpose = torch.func.vjp(normalized, *inputs)[:2]
        dz = t["dy"]
        if activation and y is not None:
            dz = dz * _derivative_of_output(t["y"], activation)
        elif activation:
            z = z if residual is None else z + t["residual"]
            (dz,) = torch.func.vjp(lambda v: _activation.apply(v, activation), z)[1](dz)
        found = dict(zip((k for k in ("x", "weight", "bias") if k in t), transpose(dz), strict=True))
        every = (found["x"], found.get("weight"), found.get("bias"), dz)
        return tuple(g for g, use in zip(every, used, strict=True) if use and g is not None)

    used = [want and d is not None for want, d in zip(wants, dgrads, strict=True)]
    if not any(used):
        return (None,) * 12
    _, transpose = torch.func.vjp(gradients, *given.values())[:2]
    back = dict(zip(given, transpose(tuple(d for d, use in zip(dgrads, used, strict=True) if use)), strict=True))
    return (
        back["dy"], back["x"], back.get("y"), back.get("residual"), None, None, back.get("weight"), back.get("bias"),
        None, None, None, None,
    )  # fmt: skip


batch_norm_backward = Operator(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? residual, Tensor mean, Tensor var, Tensor? weight, "
    "Tensor? bias, bool training, float eps, int activation, bool[4] wants) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _backward_kernel, _backward_fake, setup_context=_backward_setup, backward=_backward_backward,
    direct="batch_norm_backward_direct",
)  # fmt: skip


def _recorder(name: str, training: bool) -> Callable[..., Tensor]:
    """A function that gives a result, which the extension has computed already, its derivatives: of x, weight, bias and
    residual, then a tuple (result, mean, var), eps and activation."""

    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        made: tuple[Tensor, Tensor, Tensor], eps: float, activation: int
    ) -> Tensor:  # fmt: skip
        y, mean, var = made
        _save(ctx, x, y, residual, mean, var, weight, bias, training, eps, activation)
        return y

    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpoints unpack no tensor twice
        if dy is not None and not torch.is_grad_enabled() and direct():
            made = C.batch_norm_gradients_direct(ctx, dy, saved, threads())
            if made is not None:
                return made
        return *_gradients(ctx, dy, 0, 1, saved), None, None, None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return applier(type(name, (torch.autograd.Function,), members))


_record_training = _recorder("batch_norm_training", True)
_record_evaluation = _recorder("batch_norm_evaluation", False)


def _directly(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, training: bool, momentum: float, eps: float, activation: int
) -> Tensor | None:  # fmt: skip
    """The whole call by the extension alone, None where that cannot be."""
    grad = torch.is_grad_enabled()
    made = C.batch_norm_direct(
        input, running_mean, running_var, weight, bias, residual, training, momentum, eps, activation, grad, threads()
    )
    if type(made) is not tuple:
        return made
    if not training:
        made = made[0], running_mean, running_var
        return _record_evaluation(input, weight, bias, residual, made, eps, activation)
    if running_mean is not None and running_var is not None:
        for t in (running_mean, running_var):
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)
    if grad and any(t is not None and t.requires_grad for t in (input, weight, bias, residual)):
        return _record_training(input, weight, bias, residual, made, eps, activation)
    return made[0]


def _takes(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float
) -> bool:  # fmt: skip
    """Whether the kernels take this call; whatever they do not take is PyTorch's to compute, or to refuse."""
    if not isinstance(input, Tensor) or input.dim() < 2 or input.numel() == 0:
        return False
    if (running_mean is None) != (running_var is None):
        return False
    if not isinstance(momentum, (int, float)) or not isinstance(eps, (int, float)):
        return False
    if eps < 0 or (training and eps == 0):
        return False
    if not training and running_mean is None:
        return False
    vectors = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if not supported(input, *vectors):
        return False
    dtype = vectors[0].dtype if vectors else input.dtype
    if dtype != input.dtype and not (dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)):
        return False
    channels = input.shape[1]
    if any(t.dim() != 1 or t.shape[0] != channels or t.dtype != dtype or t.device != input.device for t in vectors):
        return False
    if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        return False
    return not training or input.numel() != channels


def _composite(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float, eps: float, activation: int, residual: Tensor | None
) -> Tensor:  # fmt: skip
    # PyTorch finds a weight on another device only after it has changed the running statistics.
    for name, t in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and isinstance(input, Tensor) and t.device != input.device:
            raise RuntimeError(f"batch_norm(): expected {name} on the input's {input.device}, but it is on {t.device}")
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _activation.apply(y if residual is None else y + residual, activation)


def _as_image(t: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, H, W], without a copy where a view can do it."""
    if t.dim() == 4:
        return t
    if t.dim() == 2:
        return t[:, :, None, None]
    if t.dim() == 3:  # PyTorch has no channels_last of rank 3
        return t.contiguous().unsqueeze(2)
    if t.dim() == 5 and t.stride(1) == 1 and not t.is_contiguous():
        t = t.contiguous(memory_format=torch.channels_last_3d)
    return t.flatten(2, -2)


def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> None:
    direct = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if direct and _plain((running_mean, running_var, mean, var)):
        C.batch_norm_update(running_mean, running_var, mean, var, momentum, count)
        for t in (running_mean, running_var):
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)
        return
    with torch.no_grad():
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * (count / (count - 1)) * var)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalization, as :func:`torch.nn.functional.batch_norm`, with a residual and an activation in one pass:
    ``y = activation(batch_norm(input) + residual)``.

    Args:
        input: ``[N, C]`` or ``[N, C, ...]``.
        running_mean, running_var: ``[C]``; used in evaluation, updated in training (the variance with its unbiased
            estimate), both None or neither.
        weight, bias: ``[C]``; ones and zeros where None. All vectors share a dtype: the input's, or float32 beside a
            16-bit input.
        training: normalize by the batch's own mean and variance.
        momentum: the weight of the new batch in the running statistics.
        eps: added to the variance.
        activation: None or one of ``relu``, ``relu6``, ``leaky_relu``, ``elu``, ``sigmoid``, ``tanh``, ``softplus``,
            ``silu``, ``hardswish``, ``gelu``, with PyTorch's default parameters.
        residual: added before the activation; of the input's shape and dtype.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        TypeError, ValueError or RuntimeError, as PyTorch; ValueError for an unknown activation; RuntimeError for a
        residual of another shape, dtype or device. The running statistics are not touched then.

    Example:
        >>> x = torch.randn(8, 3, 5, 5)
        >>> batch_norm(x, None, None, training=True, activation="relu").shape
        torch.Size([8, 3, 5, 5])

    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015.
    """
    act = _activation.index("batch_norm", activation) if activation is not None else 0
    if direct():
        made = _directly(input, running_mean, running_var, weight, bias, residual, training, momentum, eps, act)
        if made is not None:
            return made
    if residual is not None and (
        residual.shape != input.shape or residual.dtype != input.dtype or residual.device != input.device
    ):
        raise RuntimeError(
            f"batch_norm(): expected a residual like the input, {list(input.shape)} in {input.dtype} on "
            f"{input.device}, but got {list(residual.shape)} in {residual.dtype} on {residual.device}"
        )
    if not _takes(input, running_mean, running_var, weight, bias, training, momentum, eps) or needs_composite(
        input, weight, bias, residual
    ):
        return _composite(input, running_mean, running_var, weight, bias, training, momentum, eps, act, residual)
    x = _as_image(input)
    added = None if residual is None else _as_image(residual)
    if training:
        y, mean, var = batch_norm_training(x, weight, bias, added, eps, act)
        if running_mean is not None and running_var is not None:
            _update(running_mean, running_var, mean, var, momentum, x.numel() // x.shape[1])
    else:
        assert running_mean is not None
        assert running_var is not None
        y = batch_norm_evaluation(x, running_mean, running_var, weight, bias, added, eps, act)
    return y if input.dim() == 4 else y.view(input.shape)
