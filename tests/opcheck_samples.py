"""Arguments for every operator of ``torch.ops.cnnops``, in both layouts, with gradients, and with options left out.

A new operator gets its entry here: ``tests/test_whole_model.py`` fails for one that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cnnops.ops import _activation

FORMATS = (torch.contiguous_format, torch.channels_last)
SAMPLES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {}


def samples(*names: str) -> Callable[[Callable[..., Iterator[tuple[Any, ...]]]], Callable[..., Any]]:
    """Registers a generator of arguments for operators; with several names, it is told which."""

    def register(generator: Callable[..., Iterator[tuple[Any, ...]]]) -> Callable[..., Any]:
        for name in names:
            SAMPLES[name] = (lambda name=name: generator(name)) if len(names) > 1 else generator
        return generator

    return register


def rand(
    *shape: int, format: torch.memory_format = torch.contiguous_format, grad: bool = True, dtype: Any = None
) -> Tensor:
    t = torch.randn(shape, dtype=dtype)
    return (t.contiguous(memory_format=format) if t.dim() == 4 else t).requires_grad_(grad)


@samples("avg_pool2d")
def _avg_pool2d() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        yield rand(2, 3, 7, 8, format=format), (3, 2), (2, 2), (1, 0), True, False, 0
    yield rand(1, 2, 6, 6, grad=False, dtype=torch.bfloat16), (2, 2), (2, 2), (0, 0), False, True, 3


@samples("avg_pool2d_backward")
def _avg_pool2d_backward() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        nhwc = format is torch.channels_last
        yield rand(2, 3, 4, 4, format=format), 7, 8, (3, 2), (2, 2), (1, 0), False, False, 0, nhwc


@samples("adaptive_avg_pool2d", "adaptive_max_pool2d")
def _adaptive(name: str) -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        yield rand(2, 3, 7, 8, format=format), (3, 5)
    yield rand(1, 2, 6, 6, grad=False), (1, 1)


@samples("adaptive_avg_pool2d_backward")
def _adaptive_avg_pool2d_backward() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        yield rand(2, 3, 4, 3, format=format), 7, 8, format is torch.channels_last


def pools(name: str) -> Iterator[tuple[Any, ...]]:
    """Kernel, stride, padding, dilation, ceil_mode."""
    more = (True,) if name.endswith("_pick") else ()
    for format in FORMATS:
        yield rand(2, 3, 7, 8, format=format), (3, 2), (2, 1), (1, 0), (1, 2), True, *more
    yield rand(1, 2, 6, 6, grad=False), (2, 2), (2, 2), (0, 0), (1, 1), False, *(not m for m in more)


samples("max_pool2d", "max_pool2d_pick", "median_pool2d", "median_pool2d_pick")(pools)


@samples("index_pool2d_backward", "index_pool2d_gather")
def _index_pool2d(name: str) -> Iterator[tuple[Any, ...]]:
    window = (3, 2), (2, 1), (1, 0), (1, 2)
    for format in FORMATS:
        x = rand(2, 3, 7, 8, format=format)
        for narrow in (True, False):
            y, choice = torch.ops.cnnops.max_pool2d_pick(x.detach(), *window, False, narrow)
            first = rand(*y.shape, format=format) if name == "index_pool2d_backward" else x
            yield first, choice, *(x.shape[2:] if name == "index_pool2d_backward" else ()), *window


def convolutions(activations: bool = False) -> Iterator[tuple[Any, ...]]:
    """x, weight, and the geometry: stride, padding (top, bottom, left, right), dilation, groups."""
    for format in FORMATS:
        yield rand(2, 4, 7, 8, format=format), rand(6, 4, 3, 2, format=format), ((2, 1), (1, 2, 0, 1), (1, 2), 1)
        yield rand(2, 4, 7, 8, format=format), rand(8, 2, 1, 1), ((1, 1), (0, 0, 0, 0), (1, 1), 2)
    yield rand(2, 4, 7, 8), rand(4, 1, 3, 3), ((1, 1), (1, 1, 1, 1), (1, 1), 4)


def output_of(x: Tensor, w: Tensor, geometry: Any) -> Tensor:
    return torch.ops.cnnops.conv2d(x.detach(), w.detach(), None, None, *geometry, 0)


@samples("conv2d")
def _conv2d() -> Iterator[tuple[Any, ...]]:
    for i, (x, w, geometry) in enumerate(convolutions()):
        yield x, w, rand(w.shape[0]) if i % 2 else None, None, *geometry, 0
        residual = torch.randn_like(output_of(x, w, geometry))
        yield x.detach(), w.detach(), None, residual, *geometry, _activation.INDEX["relu"]


@samples("conv2d_input_grad")
def _conv2d_input_grad() -> Iterator[tuple[Any, ...]]:
    for i, (x, w, geometry) in enumerate(convolutions()):
        dy = torch.randn_like(output_of(x, w, geometry)).requires_grad_()
        yield dy, w, rand(x.shape[1]) if i % 2 else None, *x.shape[2:], *geometry


@samples("conv2d_weight_grad")
def _conv2d_weight_grad() -> Iterator[tuple[Any, ...]]:
    for i, (x, w, geometry) in enumerate(convolutions()):
        dy = torch.randn_like(output_of(x, w, geometry)).requires_grad_()
        yield dy, x, *w.shape[2:], *geometry, bool(i % 2)


@samples("conv2d_bias_grad")
def _conv2d_bias_grad() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        yield (rand(2, 3, 4, 5, format=format),)
    yield (rand(0, 3, 4, 5),)


@samples("batch_norm_training")
def _batch_norm_training() -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        yield rand(3, 4, 5, 6, format=format), rand(4), rand(4), None, 1e-5, 0
        residual = rand(3, 4, 5, 6, format=format)
        yield rand(3, 4, 5, 6, format=format), rand(4), None, residual, 1e-5, _activation.INDEX["relu"]
    yield rand(3, 4, 5, 6), None, None, None, 1e-3, _activation.INDEX["gelu"]


@samples("batch_norm_evaluation")
def _batch_norm_evaluation() -> Iterator[tuple[Any, ...]]:
    for x, weight, bias, residual, eps, activation in _batch_norm_training():
        yield x, torch.randn(4), torch.rand(4) + 0.5, weight, bias, residual, eps, activation


@samples("batch_norm_backward")
def _batch_norm_backward() -> Iterator[tuple[Any, ...]]:
    for training in (True, False):
        for x, weight, bias, residual, eps, activation in _batch_norm_training():
            y, mean, var = torch.ops.cnnops.batch_norm_training(
                *(None if t is None else t.detach() for t in (x, weight, bias, residual)), eps, activation
            )
            if not training:
                mean, var = mean.float(), var.float()
            saved = y if residual is not None else None
            wants = [True, weight is not None, bias is not None, residual is not None and bool(activation)]
            yield rand(*x.shape), x, saved, None, mean, var, weight, bias, training, eps, activation, wants


@samples("locally_connected2d")
def _locally_connected2d() -> Iterator[tuple[Any, ...]]:
    geometry = (2, 1), (1, 0), (1, 2)  # [7, 8] with 3 x 2 taps: P = (7 + 2 - 3) // 2 + 1 = 4, Q = 8 - 3 + 1 = 6
    for format in FORMATS:
        for bias in (rand(5), rand(5, 4, 6), None):
            yield rand(2, 3, 7, 8, format=format), rand(4, 6, 5, 3, 3, 2), bias, *geometry


@samples("locally_connected2d_input_grad", "locally_connected2d_weight_grad")
def _locally_connected2d_grads(name: str) -> Iterator[tuple[Any, ...]]:
    for format in FORMATS:
        x, weight, dy = (rand(2, 3, 7, 8, format=format), rand(4, 6, 5, 3, 3, 2), rand(2, 5, 4, 6, format=format))
        other, size = (weight, (7, 8)) if name == "locally_connected2d_input_grad" else (x, (3, 2))
        yield dy, other, *size, (2, 1), (1, 0), (1, 2)
