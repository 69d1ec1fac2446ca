"""Outputs so large that kernels store them around the caches (``csrc/cpu/simd/stream.h``), against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops.functional as CF
from cnnops.bench.cases import locally_connected_by_unfolding

SHAPE = (2, 32, 367, 363)  # 17 MB in bfloat16; the planes begin anywhere in a cache line
FORMATS = pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def check(call: Callable, reference: Callable, tensors: list[Tensor]) -> None:
    """Results and gradients, in the tensors' dtype."""
    dtype = tensors[0].dtype
    mine = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    y, expected = call(*mine), reference(*exact)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for name, a, b in (
        ("output", y, expected),
        *(("gradient", m.grad, e.grad) for m, e in zip(mine, exact, strict=True)),
    ):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= tolerance, f"{name}: off by {error:.1e} of the largest"


def image(dtype: torch.dtype, format: torch.memory_format, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=format)


@FORMATS
@DTYPES
@pytest.mark.parametrize(("k", "r", "stride"), [(32, 1, 1), (33, 1, 1), (48, 3, 1), (64, 3, 2)])
def test_conv2d(dtype: torch.dtype, format: torch.memory_format, k: int, r: int, stride: int) -> None:
    x, weight = image(dtype, format, 2, 32, 250, 251), image(dtype, format, k, 32, r, r) / 16
    bias = torch.randn(k).to(dtype)
    check(
        lambda x, w, b: CF.conv2d(x, w, b, stride, r // 2), lambda x, w, b: F.conv2d(x, w, b, stride, r // 2),
        [x, weight, bias],
    )  # fmt: skip


@FORMATS
@DTYPES
def test_depthwise(dtype: torch.dtype, format: torch.memory_format) -> None:
    x, weight = image(dtype, format, *SHAPE), image(dtype, format, 32, 1, 3, 3)
    check(lambda x, w: CF.conv2d(x, w, None, 1, 1, 1, 32), lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 32), [x, weight])


@FORMATS
@DTYPES
def test_batch_norm(dtype: torch.dtype, format: torch.memory_format) -> None:
    x = image(dtype, format, *SHAPE)
    scale, shift = torch.rand(32) + 0.5, torch.randn(32)
    # fmt: off
    check(
        lambda x: CF.batch_norm(x, None, None, scale, shift, True),
        lambda x: F.batch_norm(x, None, None, scale.double(), shift.double(), True), [x],
    )
    # fmt: on


@FORMATS
@DTYPES
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 160, 235, 233)])  # pixels of few cache lines and of several
def test_pooling(dtype: torch.dtype, format: torch.memory_format, name: str, shape: tuple[int, ...]) -> None:
    check(
        lambda x: getattr(CF, name)(x, 3, 2, 1), lambda x: getattr(F, name)(x, 3, 2, 1),
        [image(dtype, format, *shape)],
    )  # fmt: skip


@FORMATS
@DTYPES
def test_global_mean(dtype: torch.dtype, format: torch.memory_format) -> None:
    check(
        lambda x: CF.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1),
        [image(dtype, format, 2, 256, 130, 129)],
    )  # fmt: skip


@FORMATS
@DTYPES
@pytest.mark.parametrize("images", [1, 9])
def test_locally_connected2d(dtype: torch.dtype, format: torch.memory_format, images: int) -> None:
    x, weight = image(dtype, format, images, 16, 33, 33), torch.randn(31, 31, 64, 16, 3, 3).to(dtype)  # 18 MB
    unfolded = partial(locally_connected_by_unfolding, bias=None, stride=(1, 1), pad=(0, 0), dilation=(1, 1))
    check(CF.locally_connected2d, unfolded, [x, weight])
