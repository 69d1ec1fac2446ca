"""Derivatives of the poolings that pick one element of each window (contract: ``csrc/ops/index_pool2d.h``).

A choice is an image of the output's shape: uint8 offsets ``r * kernel_w + s`` within the window, or PyTorch's int64
indices ``h * W + w``. ``kernel`` None means adaptive windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._core import C, Operator, dense, empty, memory_format, recorder, threads
from ._pooling import output_size


def choice_dtype(kernel: tuple[int, int]) -> torch.dtype:
    """What is saved for backward: one byte where the window has no more cells than that can tell apart."""
    return torch.uint8 if kernel[0] * kernel[1] <= 255 else torch.int64


def _kernel(
    dy: Tensor,
    choice: Tensor,
    h: int,
    w: int,
    kernel: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    format = memory_format(choice)
    dx = empty((*dy.shape[:2], h, w), dy, format)
    if dy.numel():
        C.index_pool2d_backward(
            dx, dense(dy, format), dense(choice, format), kernel, stride, padding, dilation, threads()
        )
    else:
        dx.zero_()
    return dx


def _fake(dy: Tensor, choice: Tensor, h: int, w: int, *window: Any) -> Tensor:
    return empty((*dy.shape[:2], h, w), dy, memory_format(choice))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, choice, _, _, *ctx.window = inputs
    ctx.save_for_backward(choice)


def _backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    return index_pool2d_gather(ddx, *ctx.saved_tensors, *ctx.window), *[None] * 7


index_pool2d_backward = Operator(
    "index_pool2d_backward(Tensor dy, Tensor choice, SymInt h, SymInt w, int[2]? kernel, int[2] stride, "
    "int[2] padding, int[2] dilation) -> Tensor",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_backward,
    foldable=(0, 1),
    direct="index_pool2d_backward_direct",
)


def finisher(name: str) -> Callable[[Tensor, Any, bool], Any]:
    """Makes what a user gets of what the extension's direct function of a pooling that picks has returned."""
    record = recorder(name, index_pool2d_backward)

    def finish(x: Tensor, made: Any, return_indices: bool) -> Any:
        if type(made) is not tuple:
            return made
        y = made[0] if made[2] is None else record(x, made)
        return (y, made[1]) if return_indices else y

    return finish


def _gather_kernel(
    dx: Tensor, choice: Tensor, kernel: list[int] | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    format = memory_format(choice)
    dy = empty(choice.shape, dx, format)
    if dy.numel():
        C.index_pool2d_gather(
            dy, dense(dx, format), dense(choice, format), kernel, stride, padding, dilation, threads()
        )
    return dy


def _gather_fake(dx: Tensor, choice: Tensor, *window: Any) -> Tensor:
    return empty(choice.shape, dx, memory_format(choice))


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dx, choice, *ctx.window = inputs
    ctx.size = dx.shape[2:]
    ctx.save_for_backward(choice)


def _gather_backward(ctx: Any, ddy: Tensor) -> tuple[Any, ...]:
    return index_pool2d_backward(ddy, *ctx.saved_tensors, *ctx.size, *ctx.window), *[None] * 5


index_pool2d_gather = Operator(
    "index_pool2d_gather(Tensor dx, Tensor choice, int[2]? kernel, int[2] stride, int[2] padding, int[2] dilation) "
    "-> Tensor",
    _gather_kernel,
    _gather_fake,
    setup_context=_gather_setup,
    backward=_gather_backward,
    foldable=(0, 1),
)


def needs_choice(x: Tensor) -> bool:
    """Whether a derivative may be asked for, so that the choice is worth its memory."""
    return torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and x.requires_grad)


class PickOperators:
    """The two operators of a pooling that picks: ``X(x, window) -> y`` and ``X_pick(x, window, narrow) -> y, choice``.

    The second is for when a derivative or the indices are wanted; the first can be differentiated too, by picking again
    in backward.
    """

    def __init__(self, name: str, forward: Any) -> None:
        def fake(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
            size = output_size(name, x, kernel, stride, padding, dilation, ceil_mode)
            return empty((*x.shape[:2], *size), x, memory_format(x))

        def kernel(x: Tensor, *window: Any) -> Tensor:
            y = fake(x, *window)
            if y.numel():
                forward(y, None, dense(x, memory_format(x)), *window[:-1], threads())
            return y

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, *ctx.window = inputs
            ctx.save_for_backward(x)

        def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
            (x,) = ctx.saved_tensors
            narrow = choice_dtype(ctx.window[0]) is torch.uint8
            _, choice = self.pick(x.detach(), *ctx.window, narrow)
            dx = index_pool2d_backward(dy, choice, *x.shape[2:], *ctx.window[:-1])
            return dx, *[None] * len(ctx.window)

        arguments = "Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
        self.plain = Operator(
            f"{name}({arguments}) -> Tensor", kernel, fake, setup_context=setup, backward=backward, foldable=(0,)
        )

        def pick_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            y = fake(x, *args[:-1])
            return y, empty(y.shape, x, memory_format(x), torch.uint8 if args[-1] else torch.int64)

        def pick_kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            y, choice = pick_fake(x, *args)
            if y.numel():
                forward(y, choice, dense(x, memory_format(x)), *args[:-2], threads())
            return y, choice

        def pick_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            x, *ctx.window, _, _ = inputs
            ctx.size = x.shape[2:]
            ctx.mark_non_differentiable(output[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(output[1])

        def pick_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
            dx = None if dy is None else index_pool2d_backward(dy, *ctx.saved_tensors, *ctx.size, *ctx.window)
            return dx, *[None] * 6

        self.pick = Operator(
            f"{name}_pick({arguments}, bool narrow) -> (Tensor, Tensor)",
            pick_kernel,
            pick_fake,
            setup_context=pick_setup,
            backward=pick_backward,
            foldable=(0,),
        )

    def __call__(self, x: Tensor, *window: Any) -> Tensor:
        if needs_choice(x):
            return self.pick(x, *window, choice_dtype(window[0]) is torch.uint8)[0]
        return self.plain(x, *window)
