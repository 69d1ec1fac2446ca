"""conv2d and conv_transpose2d as PyTorch users call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE
from torch import Tensor

from cnnops import functional as CF

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to a float64 truth within the dtype, relative to the largest element."""
    assert got.shape == expected.shape
    bound = TOLERANCE[got.dtype] * (float(expected.detach().abs().max()) + 1 if expected.numel() else 1)
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "weight", "arguments"),
    [
        ((2, 5, 9, 11), (7, 5, 3, 3), dict(padding=1)),
        ((1, 6, 10, 8), (4, 3, 3, 2), dict(stride=(2, 1), padding=(0, 1), groups=2, dilation=(1, 2))),
        ((2, 9, 8, 7), (9, 1, 3, 3), dict(stride=2, padding=1, groups=9)),
        ((3, 8, 6), (5, 3, 2, 2), dict(padding="valid")),
        ((2, 4, 9, 9), (6, 4, 3, 4), dict(padding="same", dilation=2)),
        ((0, 4, 5, 5), (6, 4, 3, 3), {}),
        ((2, 1, 6, 6), (3, 1, 1, 1), {}),
        ((17, 16, 20, 20), (18, 16, 1, 1), {}),  # sums of more pixels than one task adds up at a time
    ],
)
def test_conv2d_and_its_gradients(
    shape: tuple, weight: tuple, arguments: dict, format: torch.memory_format, dtype: torch.dtype
) -> None:
    def leaf(*size: int) -> Tensor:
        t = torch.randn(size, dtype=torch.float64).to(dtype)
        return (t.contiguous(memory_format=format) if t.dim() == 4 else t).requires_grad_()

    x, w, b = leaf(*shape), leaf(*weight), leaf(weight[0])
    y, expected = CF.conv2d(x, w, b, **arguments), F.conv2d(x, w, b, **arguments)
    truth = F.conv2d(x.double(), w.double(), b.double(), **arguments)
    assert y.dtype == expected.dtype
    if y.numel():
        assert y.stride() == expected.stride()
    close(y, truth)
    dy = torch.randn_like(truth).to(dtype)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, w, b), dy), torch.autograd.grad(truth, (x, w, b), dy.double()), strict=True
    ):
        close(mine, theirs)


@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_same_padding_makes_ceil_of_input_over_stride(stride: Any, size: tuple[int, int], dilation: Any) -> None:
    x, w = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, 3, 4, dtype=torch.float64)
    y = CF.conv2d(x, w, stride=stride, padding="same", dilation=dilation)
    steps, spread = (stride,) * 2 if isinstance(stride, int) else stride, dilation
    spread = (dilation,) * 2 if isinstance(dilation, int) else dilation
    assert y.shape[2:] == tuple(-(-n // s) for n, s in zip(size, steps, strict=True))
    pads = []
    for n, s, k, d in zip(size, steps, (3, 4), spread, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    padded = F.pad(x, (*pads[1], *pads[0]))
    torch.testing.assert_close(y, F.conv2d(padded, w, stride=stride, dilation=dilation))


def test_full_padding_shows_every_pixel_to_every_tap() -> None:
    x, w = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(3, 2, 3, 2, dtype=torch.float64)
    y = CF.conv2d(x, w, padding="full", dilation=(1, 2))
    torch.testing.assert_close(y, F.conv2d(x, w, padding=(2, 2), dilation=(1, 2)))
    assert y.shape == (1, 3, 7, 8)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "hardswish"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_last_step(activation: str | None, grad: bool, groups: int) -> None:
    x, w = torch.randn(2, 4, 7, 6, dtype=torch.float64), torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64)
    b, r = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    for t in (x, w, b, r):
        t.requires_grad_(grad)
    y = CF.conv2d(x, w, b, padding=1, groups=groups, activation=activation, residual=r)
    z = F.conv2d(x, w, b, padding=1, groups=groups) + r
    expected = getattr(F, activation)(z) if activation else z
    torch.testing.assert_close(y, expected)
    if grad:
        for mine, theirs in zip(
            torch.autograd.grad(y.square().sum(), (x, w, b, r)),
            torch.autograd.grad(expected.square().sum(), (x, w, b, r)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_derivatives_of_first_and_second_order(function: str, format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64).contiguous(memory_format=format).requires_grad_()
    w = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    f = partial(getattr(CF, function), stride=(2, 1), padding=1, groups=2)
    assert torch.autograd.gradcheck(f, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, w, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(stride=2, padding=1, output_padding=1),
        dict(stride=(1, 3), groups=2, dilation=(2, 1), padding=(2, 0)),
    ],
)
def test_conv_transpose2d(arguments: dict, dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 4, 6, 5).to(dtype), torch.randn(4, 3, 3, 4).to(dtype)
    b = torch.randn(3 * arguments.get("groups", 1)).to(dtype)
    for format in FORMATS:
        image = x.contiguous(memory_format=format)
        y, theirs = CF.conv_transpose2d(image, w, b, **arguments), F.conv_transpose2d(image, w, b, **arguments)
        assert y.stride() == theirs.stride()
        close(y, F.conv_transpose2d(x.double(), w.double(), b.double(), **arguments))


def test_any_strides() -> None:
    x = torch.randn(3, 12, 14, 4, dtype=torch.float64).permute(0, 3, 2, 1)[:, :, ::2, 1:]
    w = torch.randn(3, 3, 6, 4, dtype=torch.float64).permute(2, 3, 1, 0)
    b = torch.randn(12, dtype=torch.float64)[::2]
    torch.testing.assert_close(CF.conv2d(x, w, b), F.conv2d(x, w, b))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("k", "groups"), [(21, 1), (20, 20), (30, 10)])
def test_any_number_of_threads_gives_the_same_bits(format: torch.memory_format, k: int, groups: int) -> None:
    x = torch.randn(3, 20, 23, 19).contiguous(memory_format=format)
    w = torch.randn(k, 20 // groups, 3, 3, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x_leaf = x.detach().requires_grad_()
            y = CF.conv2d(x_leaf, w, padding=1, groups=groups)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x_leaf, w))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_inf_flow() -> None:
    x = torch.randn(1, 3, 8, 8)
    x[0, 0, 2, 2], x[0, 1, 6, 6] = float("nan"), float("inf")
    w = torch.rand(4, 3, 3, 3) + 0.1
    y, expected = CF.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())


X, W = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
BAD: list[tuple[str, Callable[[Any], Any]]] = [
    ("channels", lambda f: f.conv2d(X, W[:, :3])),
    ("groups", lambda f: f.conv2d(X, W[:, :1], groups=4)),
    ("groups", lambda f: f.conv2d(X, W, groups=0)),
    ("weight", lambda f: f.conv2d(X, W[0])),
    ("input", lambda f: f.conv2d(X[0, 0], W)),
    ("input", lambda f: f.conv2d(X[None], W)),
    ("stride", lambda f: f.conv2d(X, W, stride=0)),
    ("stride", lambda f: f.conv2d(X, W, stride=(1, -1))),
    ("dilation", lambda f: f.conv2d(X, W, dilation=0)),
    ("padding", lambda f: f.conv2d(X, W, padding=-1)),
    ("padding", lambda f: f.conv2d(X, W, padding="nonsense")),
    ("kernel", lambda f: f.conv2d(X, torch.randn(6, 4, 9, 9))),
    ("kernel", lambda f: f.conv2d(X, W, dilation=4)),
    ("bias", lambda f: f.conv2d(X, W, torch.randn(5))),
    ("bias", lambda f: f.conv2d(X, W, torch.randn(6, 1))),
    ("weight", lambda f: f.conv2d(X, W.double())),
    ("bias", lambda f: f.conv2d(X, W, torch.randn(6).double())),
    ("channels", lambda f: f.conv_transpose2d(X, W)),
    ("output_padding", lambda f: f.conv_transpose2d(X, W.transpose(0, 1), output_padding=1)),
    ("stride", lambda f: f.conv_transpose2d(X, W.transpose(0, 1), stride=0)),
    ("bias", lambda f: f.conv_transpose2d(X, W.transpose(0, 1), torch.randn(5))),
    ("output", lambda f: f.conv_transpose2d(X, W.transpose(0, 1), padding=6)),
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_bad_calls_raise_what_pytorch_raises(name: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
        call(F)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as ours:
        call(CF)
    assert type(ours.value) is type(theirs.value), (ours.value, theirs.value)
    assert name in str(ours.value)


def test_bad_arguments_that_pytorch_does_not_have() -> None:
    with pytest.raises(RuntimeError, match="residual"):
        CF.conv2d(X, W, residual=torch.randn(2, 6, 8, 8))
    with pytest.raises(RuntimeError, match="residual"):
        CF.conv2d(X, W, residual=torch.randn(2, 6, 6, 6).double())
    with pytest.raises(ValueError, match="activation"):
        CF.conv2d(X, W, activation="swish")


def test_sizes_whose_product_overflows() -> None:
    x = torch.empty(1, 1, 1, 1).expand(2**31, 1, 2**31, 1)
    with pytest.raises((RuntimeError, MemoryError, ValueError)):
        CF.conv2d(x, torch.ones(2**10, 1, 1, 1).expand(2**10, 1, 1, 1))


def test_autocast_casts_as_pytorch_does() -> None:
    b = torch.randn(6)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, theirs = CF.conv2d(X, W, b), F.conv2d(X, W, b)
    assert y.dtype == theirs.dtype == torch.bfloat16
    close(y, F.conv2d(X.bfloat16().double(), W.bfloat16().double(), b.bfloat16().double()))
