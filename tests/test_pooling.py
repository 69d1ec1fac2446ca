"""Pooling end to end: results, gradients of both orders, strides, errors and torch's transforms, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from place import DEVICE
from torch import Tensor
from torch.autograd import forward_ad

import cnnops.functional as cf
from cnnops.ops._core import OPERATORS
from cnnops.ops._pooling import window
from cnnops.ops.median_pool2d import _composite

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
POOLS: tuple[dict[str, Any], ...] = (
    dict(kernel_size=2),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(3, 2), stride=(1, 3), padding=(1, 0), ceil_mode=True),
    dict(kernel_size=5, stride=3, padding=2, ceil_mode=True),
    dict(kernel_size=(2, 17), stride=(2, 1), padding=(1, 8)),
)
DILATED = (
    dict(kernel_size=3, dilation=2),
    dict(kernel_size=(2, 3), stride=2, padding=1, dilation=(3, 2), ceil_mode=True),
)
SHAPES = ((2, 3, 9, 20), (1, 17, 8, 7), (2, 1, 5, 40))
SIZES = (1, 3, (2, 4), (None, 3), (20, 30))


def median_pool2d_of_torch(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Median pooling of an input without NaN: unfolded from one padded with NaN, which nanmedian leaves out."""
    ceil_mode = kwargs.pop("ceil_mode", False)
    names = ("kernel_size", "stride", "padding", "dilation")
    kernel, stride, pad, dilation = window(
        "", **dict(dict(zip(names, args, strict=False), stride=None, padding=0), **kwargs)
    )
    size = F.max_pool2d(input, kernel, stride, pad, dilation, ceil_mode).shape[-2:]
    more = [
        max((size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - input.shape[-2 + i] - pad[i], 0)
        for i in (0, 1)
    ]
    padded = F.pad(input, (pad[1], more[1], pad[0], more[0]), value=float("nan"))
    rows = padded.unfold(-2, dilation[0] * (kernel[0] - 1) + 1, stride[0])
    cells = rows.unfold(-2, dilation[1] * (kernel[1] - 1) + 1, stride[1])[..., :: dilation[0], :: dilation[1]]
    return cells[..., : size[0], : size[1], :, :].flatten(-2).nanmedian(-1).values


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, format: str = "nchw") -> Tensor:
    """Values without ties (but for bfloat16's 8 bits of fraction), so that one element is picked whatever the rule."""
    numel = torch.Size(shape).numel()
    values = torch.randperm(numel) / 4 - numel // 8
    if dtype in (torch.bfloat16, torch.float16):
        values = values % 256 if dtype is torch.bfloat16 else values.clamp(-500, 500)
    return values.view(shape).to(dtype).contiguous(memory_format=FORMATS[format])


def ties(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, format: str = "nchw") -> Tensor:
    """Few values, and some NaN and Inf."""
    x = torch.randint(-3, 4, shape).double()
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(shape) < 0.04] = value
    return x.to(dtype).contiguous(memory_format=FORMATS[format])


# name -> (ours, the oracle, keyword arguments)
CASES: list[Any] = []
for _pool in POOLS:
    CASES.append(pytest.param(cf.max_pool2d, F.max_pool2d, _pool, id=f"max-{_pool}"))
    CASES.append(pytest.param(cf.avg_pool2d, F.avg_pool2d, _pool, id=f"avg-{_pool}"))
    CASES.append(pytest.param(cf.median_pool2d, median_pool2d_of_torch, _pool, id=f"median-{_pool}"))
    for _more in (dict(count_include_pad=False), dict(divisor_override=7)):
        CASES.append(pytest.param(cf.avg_pool2d, F.avg_pool2d, {**_pool, **_more}, id=f"avg-{_pool}-{_more}"))
for _pool in DILATED:
    CASES.append(pytest.param(cf.max_pool2d, F.max_pool2d, _pool, id=f"max-{_pool}"))
    CASES.append(pytest.param(cf.median_pool2d, median_pool2d_of_torch, _pool, id=f"median-{_pool}"))
for _size in SIZES:
    for _name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        CASES.append(
            pytest.param(getattr(cf, _name), getattr(F, _name), dict(output_size=_size), id=f"{_name}-{_size}")
        )
# One small case of each operator, for what does not depend on the windows.
EACH = [
    pytest.param(cf.max_pool2d, F.max_pool2d, POOLS[1], id="max"),
    pytest.param(cf.avg_pool2d, F.avg_pool2d, POOLS[1], id="avg"),
    pytest.param(cf.median_pool2d, median_pool2d_of_torch, POOLS[1], id="median"),
    pytest.param(cf.adaptive_avg_pool2d, F.adaptive_avg_pool2d, dict(output_size=(2, 3)), id="adaptive_avg"),
    pytest.param(cf.adaptive_avg_pool2d, F.adaptive_avg_pool2d, dict(output_size=1), id="global_avg"),
    pytest.param(cf.adaptive_max_pool2d, F.adaptive_max_pool2d, dict(output_size=(2, 3)), id="adaptive_max"),
]
each_op = pytest.mark.parametrize(("ours", "theirs", "arguments"), EACH)


def tolerance(dtype: torch.dtype, terms: int = 400) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return dict(rtol=4 * eps, atol=4 * eps * 250 * (1 if eps > 1e-4 else terms**0.5))


def check(got: Tensor, expected: Tensor, **kwargs: Any) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, equal_nan=True, **kwargs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "arguments"), CASES)
def test_result_and_gradient_are_right(
    ours: Callable, theirs: Callable, arguments: dict, dtype: torch.dtype, format: str
):
    for shape in SHAPES:
        x = image(shape, dtype, format).requires_grad_()
        exact = x.detach().double().requires_grad_()
        try:
            expected = theirs(exact, **arguments)
        except RuntimeError:  # the kernel is larger than this image
            with pytest.raises(RuntimeError):
                ours(x, **arguments)
            continue
        y = ours(x, **arguments)
        assert y.stride() == expected.contiguous(memory_format=FORMATS[format]).stride()
        dy = torch.randint(-4, 5, y.shape).to(dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
        check(y, expected.to(dtype), **tolerance(dtype))
        assert torch.equal(ours(x.detach(), **arguments), y), "the value depends on whether a gradient is asked for"
        assert dx.stride() == x.stride()
        if "bfloat16" in str(dtype) and "avg" not in ours.__name__:
            continue  # 8 bits of fraction make ties, which the test below looks at
        (expected_dx,) = torch.autograd.grad(expected, exact, dy.double())
        check(dx, expected_dx.to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", [*POOLS, *DILATED], ids=str)
def test_max_pool2d_settles_ties_and_nan_as_pytorch(arguments: dict, dtype: torch.dtype, format: str):
    for shape in SHAPES:
        x = ties(shape, dtype, format).requires_grad_()
        try:
            expected, expected_indices = F.max_pool2d(x, **arguments, return_indices=True)
        except RuntimeError:
            continue
        y, indices = cf.max_pool2d(x, **arguments, return_indices=True)
        assert indices.dtype == torch.int64
        for got, right in ((y, expected), (indices, expected_indices), (cf.max_pool2d(x, **arguments), expected)):
            check(got.detach(), right.detach(), rtol=0, atol=0)
            assert got.stride() == right.stride()
        assert not indices.requires_grad
        dy = torch.randint(-4, 5, y.shape).to(dtype)
        (right,) = torch.autograd.grad(expected, x, dy)
        for y_of in (y, cf.max_pool2d(x, **arguments)):  # through indices, and through offsets
            check(torch.autograd.grad(y_of, x, dy)[0], right, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adaptive_max_pool2d_settles_ties_and_nan_as_pytorch(size: Any, format: str):
    for shape in SHAPES:
        x = ties(shape, torch.float32, format).requires_grad_()
        expected = F.adaptive_max_pool2d(x, size, return_indices=True)
        got = cf.adaptive_max_pool2d(x, size, return_indices=True)
        for a, b in zip(got, expected, strict=True):
            check(a.detach(), b.detach(), rtol=0, atol=0)
            assert a.stride() == b.stride()
        dy = torch.randint(-4, 5, expected[0].shape).float()
        (dx,), (right,) = (torch.autograd.grad(y[0], x, dy) for y in (got, expected))
        check(dx, right, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arguments", [*POOLS, *DILATED], ids=str)
def test_median_pool2d_agrees_with_its_composite_on_ties_and_nan(arguments: dict, format: str):
    pairs = window("", **{"stride": None, "padding": 0, **{k: v for k, v in arguments.items() if k != "ceil_mode"}})
    for shape in SHAPES:
        x = ties(shape, torch.float32, format).requires_grad_()
        y = cf.median_pool2d(x, **arguments)
        expected = _composite(x, *pairs, arguments.get("ceil_mode", False))
        dy = torch.randint(-4, 5, y.shape).float()
        (dx,), (right,) = (torch.autograd.grad(out, x, dy) for out in (y, expected))
        check(y.detach(), expected.detach(), rtol=0, atol=0)
        check(dx, right, rtol=0, atol=0)


def test_median_of_an_even_number_is_the_lower_middle_and_padding_takes_no_part():
    x = torch.tensor([[[4.0, 1.0, 7.0], [3.0, 3.0, float("nan")], [8.0, 2.0, 5.0]]], requires_grad=True)
    y = cf.median_pool2d(x, 2, stride=1, padding=1)
    nan = float("nan")
    expected = [[4.0, 1.0, 1.0, 7.0], [3.0, 3.0, nan, nan], [3.0, 3.0, nan, nan], [8.0, 2.0, 2.0, 5.0]]
    check(y.detach(), torch.tensor([expected]), rtol=0, atol=0)
    y[0, 1, 1].backward()  # of 4 1 3 3 the first 3, not the second
    assert x.grad is not None
    assert x.grad.nonzero().tolist() == [[0, 1, 0]]


def test_a_window_without_cells_has_a_value_and_no_gradient():
    # Dilated past a one-pixel image: all taps lie in the padding. PyTorch's gradient writes outside of its memory here.
    for pool, value in ((cf.max_pool2d, -float("inf")), (cf.median_pool2d, float("nan"))):
        for format in FORMATS.values():
            x = torch.ones(2, 3, 1, 1).contiguous(memory_format=format).requires_grad_()
            y = pool(x, 2, stride=1, padding=1, dilation=2)
            check(y.detach(), torch.full((2, 3, 1, 1), value), rtol=0, atol=0)
            y.backward(torch.ones_like(y))
            assert torch.equal(x.grad, torch.zeros(2, 3, 1, 1))
    indices = cf.max_pool2d(torch.ones(1, 1, 1, 1), 2, 1, 1, 2, return_indices=True)[1]
    assert indices.tolist() == [[[[-1]]]]


@each_op
def test_3d_empty_batch_and_other_strides(ours: Callable, theirs: Callable, arguments: dict):
    whole = image((3, 4, 18, 22), torch.float32)
    for x in (
        whole[0],
        whole[0].permute(0, 2, 1),
        whole[:0],
        whole[..., ::2],
        whole[:, ::2, 1:],
        whole.transpose(2, 3),
        whole.contiguous(memory_format=torch.channels_last)[:, :, :9],
        whole[:1, :1].expand(2, 3, 18, 22),
        whole.contiguous(memory_format=torch.channels_last)[0],
        whole[:, :1].contiguous(memory_format=torch.channels_last),
    ):
        leaf = x.detach().requires_grad_()
        y, expected = ours(leaf, **arguments), theirs(leaf, **arguments)
        assert y.shape == expected.shape
        if theirs is not median_pool2d_of_torch:
            assert y.stride() == expected.stride()
        check(y.detach(), expected.detach(), **tolerance(torch.float32))
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        (right,) = torch.autograd.grad(expected.sum(), leaf)
        check(dx, right, **tolerance(torch.float32))


@pytest.mark.parametrize("format", FORMATS)
@each_op
def test_gradcheck_and_gradgradcheck(ours: Callable, theirs: Callable, arguments: dict, format: str):
    x = image((2, 2, 5, 6), format=format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x, **arguments), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ours(x, **arguments), (x,))


@pytest.mark.parametrize("pool", [cf.max_pool2d, cf.median_pool2d], ids=lambda f: f.__name__)
def test_gradcheck_where_offsets_do_not_fit_a_byte(pool: Callable):
    x = image((1, 2, 17, 18)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, (16, 16), 1), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pool(x, (16, 16), 1), (x,))


@pytest.mark.parametrize("pool", [cf.max_pool2d, cf.median_pool2d], ids=lambda f: f.__name__)
def test_training_saves_one_byte_per_window(pool: Callable):
    saved: list[Tensor] = []
    x = image((2, 3, 8, 8), torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = pool(x, 3, 2, 1)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, y.shape)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("side", [8, 96])
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("max_pool2d", (3, 2, 1)), *(("adaptive_max_pool2d", (size,)) for size in (1, 4, 5, (8, None)))],
    ids=str,
)
def test_a_maximum_has_its_gradient_beside_its_indices(
    name: str, arguments: tuple, indices: bool, side: int, format: str
):
    x = image((2, 50, side, side), torch.float32, format).requires_grad_()
    found, expected = (getattr(f, name)(x, *arguments, return_indices=indices) for f in (cf, F))
    if indices:
        (found, at), (expected, true) = found, expected
        assert torch.equal(at, true)
        assert not at.requires_grad
    dy = torch.randn_like(expected)
    assert torch.equal(found, expected)
    close = {"rtol": 1e-5, "atol": 1e-5}  # overlapping windows add up in another order
    torch.testing.assert_close(torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(expected, x, dy)[0], **close)


WINDOW = ([3, 2], [2, 2], [1, 1])


def _images(format: str = "nchw", grad: bool = True) -> tuple[Tensor, Tensor]:
    x = image((2, 3, 6, 7), torch.float64, format)
    return x.requires_grad_(grad), F.max_pool2d(x.detach(), *WINDOW)


def _calls(format: str) -> dict[str, tuple[Any, ...]]:
    x, y = _images(format)
    dy = torch.randn_like(y).requires_grad_()
    dilation, last = [1, 1], format == "nhwc"
    _, offsets = OPERATORS["max_pool2d_pick"].kernel(x.detach(), *WINDOW, dilation, False, True)
    _, indices = OPERATORS["adaptive_max_pool2d"].kernel(x.detach(), [4, 4])
    dy_adaptive = (
        torch.randn(2, 3, 4, 4, dtype=torch.float64).contiguous(memory_format=FORMATS[format]).requires_grad_()
    )
    adaptive = (None, [1, 1], [0, 0], [1, 1])
    return {
        "max_pool2d": (x, *WINDOW, dilation, False),
        "max_pool2d_pick": (x, *WINDOW, dilation, False, True),
        "max_pool2d_pick/indices": (x, *WINDOW, dilation, True, False),
        "median_pool2d": (x, *WINDOW, dilation, False),
        "median_pool2d_pick": (x, *WINDOW, dilation, False, True),
        "index_pool2d_backward": (dy, offsets, 6, 7, *WINDOW, dilation),
        "index_pool2d_backward/adaptive": (dy_adaptive, indices, 6, 7, *adaptive),
        "index_pool2d_gather": (x, offsets, *WINDOW, dilation),
        "index_pool2d_gather/adaptive": (x, indices, *adaptive),
        "avg_pool2d": (x, *WINDOW, False, True, 0),
        "avg_pool2d_backward": (dy, 6, 7, *WINDOW, False, True, 0, last),
        "adaptive_avg_pool2d": (x, [4, 4]),
        "adaptive_avg_pool2d_backward": (dy_adaptive, 6, 7, last),
        "adaptive_max_pool2d": (x, [4, 4]),
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", _calls("nchw"))
def test_opcheck(name: str, format: str):
    operator = getattr(torch.ops.cnnops, name.split("/")[0]).default
    torch.library.opcheck(operator, _calls(format)[name])


def test_opcheck_covers_every_pooling_operator():
    assert {name.split("/")[0] for name in _calls("nchw")} == {name for name in OPERATORS if "pool2d" in name}


@each_op
def test_compile_vmap_and_func(ours: Callable, theirs: Callable, arguments: dict):
    def loss(x: Tensor) -> Tensor:
        return (ours(x, **arguments) ** 2).sum()

    def right_loss(x: Tensor) -> Tensor:
        return (theirs(x, **arguments) ** 2).sum()

    torch._dynamo.reset()
    x = image((2, 3, 6, 7), torch.float64)
    y = ours(x, **arguments)
    compiled = torch.compile(lambda x: ours(x, **arguments), fullgraph=True, backend="aot_eager")
    check(compiled(x), y, rtol=0, atol=0)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = compiled(leaf)
    check(out.detach(), y, rtol=0, atol=0)
    dy = torch.randn_like(out)
    out.backward(dy)
    ours(plain, **arguments).backward(dy)
    check(leaf.grad, plain.grad, rtol=0, atol=0)

    right = torch.autograd.functional.vjp(right_loss, x)[1]
    check(torch.func.grad(loss)(x), right)
    batch = torch.stack([image((2, 3, 6, 7)) for _ in range(4)])
    each = torch.stack([ours(b, **arguments) for b in batch])
    check(torch.vmap(lambda x: ours(x, **arguments))(batch), each)
    check(torch.vmap(lambda x: ours(x, **arguments), in_dims=2, out_dims=1)(batch.movedim(0, 2)), each.movedim(0, 1))
    per_sample = torch.vmap(torch.func.grad(loss))(batch)
    check(per_sample, torch.stack([torch.func.grad(loss)(b) for b in batch]))
    check(torch.func.grad(lambda batch: torch.vmap(loss)(batch).sum())(batch), per_sample)
    hessian = torch.func.jacrev(torch.func.grad(loss))(x[:1, :1])
    check(hessian, torch.autograd.functional.hessian(right_loss, x[:1, :1]))


@each_op
def test_forward_mode(ours: Callable, theirs: Callable, arguments: dict):
    x, t = image((2, 3, 6, 7)), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    # The derivative along t, by the gradient: <dy, J t> = <J^T dy, t>.
    y, pull = torch.func.vjp(lambda x: ours(x, **arguments), x)
    dy = torch.randn_like(y)
    expected = (pull(dy)[0] * t).sum()
    out, tangent = torch.func.jvp(lambda x: ours(x, **arguments), (x,), (t,))
    check(out, y)
    check((dy * tangent).sum(), expected)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, t), **arguments)
        check((dy * forward_ad.unpack_dual(dual).tangent).sum(), expected)


@each_op
def test_same_bits_for_any_number_of_threads(ours: Callable, theirs: Callable, arguments: dict):
    before = torch.get_num_threads()
    try:
        for format in FORMATS:
            x = torch.randn(2, 5, 19, 33).contiguous(memory_format=FORMATS[format])
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                y = ours(leaf, **arguments)
                results.append((y.detach(), torch.autograd.grad(y, leaf, torch.sin(y.detach()))[0]))
            for y, dx in results[1:]:
                assert torch.equal(y, results[0][0])
                assert torch.equal(dx, results[0][1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", FORMATS)
def test_the_mean_of_a_large_plane_is_accurate(format: str):
    x = (torch.rand(1, 5, 256, 256) + 100).contiguous(memory_format=FORMATS[format])
    expected = x.double().mean((2, 3), keepdim=True)
    assert ((cf.adaptive_avg_pool2d(x, 1) - expected).abs() / expected).max() < 1e-7


@pytest.mark.parametrize("pool", [cf.max_pool2d, cf.avg_pool2d, cf.median_pool2d], ids=lambda f: f.__name__)
def test_dtypes_without_kernels_go_to_pytorch(pool: Callable):
    x = torch.arange(2 * 3 * 6 * 6, device="cpu").view(2, 3, 6, 6)  # on CUDA, PyTorch pools no integers
    y = pool(x, 3)
    assert y.dtype == torch.int64
    if pool is cf.median_pool2d:
        assert torch.equal(y, median_pool2d_of_torch(x.double(), 3).long())
    else:
        assert torch.equal(y, getattr(F, pool.__name__)(x, 3))


def test_sixteen_bit_sums_are_kept_in_float32():
    x = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    assert cf.avg_pool2d(x, 64).item() == 1
    assert cf.adaptive_avg_pool2d(x, 1).item() == 1


BIG = 2**40
BAD_WINDOWS: tuple[tuple[dict[str, Any], str], ...] = (
    (dict(kernel_size=0), "kernel_size"),
    (dict(kernel_size=(2, -1)), "kernel_size"),
    (dict(kernel_size=(2, 2, 2)), "kernel_size"),
    (dict(kernel_size=()), "kernel_size"),
    (dict(kernel_size=2.0), "kernel_size"),
    (dict(kernel_size=(2, 2.5)), "kernel_size"),
    (dict(kernel_size="a"), "kernel_size"),
    (dict(kernel_size=None), "kernel_size"),
    (dict(kernel_size=True), "kernel_size"),
    (dict(kernel_size=BIG), "kernel_size"),
    (dict(kernel_size=2**70), "kernel_size"),
    (dict(kernel_size=BIG, padding=BIG // 2), "kernel_size"),
    (dict(kernel_size=2, stride=0), "stride"),
    (dict(kernel_size=2, stride=(1, -1)), "stride"),
    (dict(kernel_size=2, stride=(1, 1, 1)), "stride"),
    (dict(kernel_size=2, stride=1.5), "stride"),
    (dict(kernel_size=2, stride=BIG), "stride"),
    (dict(kernel_size=2, padding=-1), "padding"),
    (dict(kernel_size=2, padding=(0, 2)), "padding"),
    (dict(kernel_size=3, padding=2), "padding"),
    (dict(kernel_size=3, padding=(1, 1, 1)), "padding"),
    (dict(kernel_size=9), "kernel_size"),
    (dict(kernel_size=(1, 12), padding=(0, 1)), "kernel_size"),
    (dict(kernel_size=2, ceil_mode=3), "ceil_mode"),
    (dict(kernel_size=2, ceil_mode=None), "ceil_mode"),
)
BAD_DILATIONS = (
    (dict(kernel_size=2, dilation=0), "dilation"),
    (dict(kernel_size=2, dilation=-1), "dilation"),
    (dict(kernel_size=2, dilation=(1, 1, 1)), "dilation"),
    (dict(kernel_size=2, dilation=1.5), "dilation"),
    (dict(kernel_size=2, dilation=8), "dilation"),
    (dict(kernel_size=2, dilation=2**62), "dilation"),
    (dict(kernel_size=4, padding=3, dilation=2), "padding"),
)
BAD_MEANS = (
    (dict(kernel_size=2, divisor_override=0), "divisor_override"),
    (dict(kernel_size=2, divisor_override=2.0), "divisor_override"),
    (dict(kernel_size=2, count_include_pad=None), "count_include_pad"),
)
BAD_SIZES = (
    (dict(output_size=-1), "output_size"),
    (dict(output_size=(2, -2)), "output_size"),
    (dict(output_size=(2,)), "output_size"),
    (dict(output_size=()), "output_size"),
    (dict(output_size=(2, 2, 2)), "output_size"),
    (dict(output_size=(2, 2, 2, 2)), "output_size"),
    (dict(output_size=None), "output_size"),
    (dict(output_size=2.0), "output_size"),
    (dict(output_size=(2, 2.0)), "output_size"),
    (dict(output_size="a"), "output_size"),
    (dict(output_size=BIG), "output_size"),
    (dict(output_size=2**33), "output_size"),
)
GOOD: dict[Callable, dict[str, Any]] = {
    cf.max_pool2d: dict(kernel_size=2),
    cf.avg_pool2d: dict(kernel_size=2),
    cf.median_pool2d: dict(kernel_size=2),
    cf.adaptive_avg_pool2d: dict(output_size=2),
    cf.adaptive_max_pool2d: dict(output_size=2),
}


def class_of_error(function: Callable, *args: Any, **kwargs: Any) -> type[BaseException] | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error)
    return None


def bad_calls() -> list[Any]:
    lists = {
        cf.max_pool2d: BAD_WINDOWS + BAD_DILATIONS,
        cf.median_pool2d: BAD_WINDOWS + BAD_DILATIONS,
        cf.avg_pool2d: BAD_WINDOWS + BAD_MEANS,
        cf.adaptive_avg_pool2d: BAD_SIZES,
        cf.adaptive_max_pool2d: BAD_SIZES,
    }
    return [
        pytest.param(pool, arguments, name, id=f"{pool.__name__}-{arguments}")
        for pool, calls in lists.items()
        for arguments, name in calls
    ]


@pytest.mark.parametrize(("pool", "arguments", "name"), bad_calls())
def test_bad_arguments_raise_what_pytorch_raises_and_are_named(pool: Callable, arguments: dict, name: str):
    # PyTorch has no median pooling: what max pooling raises.
    theirs = F.max_pool2d if pool is cf.median_pool2d else getattr(F, pool.__name__)
    x = torch.ones(2, 3, 8, 8)
    expected = class_of_error(theirs, x, **arguments)
    assert expected is not None
    with pytest.raises(expected) as caught:
        pool(x, **arguments)
    assert caught.type is expected
    assert pool.__name__ in str(caught.value)
    assert name in str(caught.value)


BAD_SHAPES = (
    (8, 8),
    (8,),
    (1, 2, 3, 8, 8),
    (2, 0, 8, 8),
    (2, 3, 0, 8),
    (2, 3, 8, 0),
    (0, 8, 8),
    (3, 0, 8),
    (0, 3, 8, 8),
)


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=str)
@pytest.mark.parametrize("pool", GOOD, ids=lambda f: f.__name__)
def test_bad_shapes_raise_what_pytorch_raises(pool: Callable, shape: tuple[int, ...]):
    theirs = F.max_pool2d if pool is cf.median_pool2d else getattr(F, pool.__name__)
    x = torch.ones(shape)
    expected = class_of_error(theirs, x, **GOOD[pool])
    if expected is None:  # some of these are right
        right = theirs(x, **GOOD[pool])
        assert pool(x, **GOOD[pool]).shape == right.shape
        return
    with pytest.raises(expected) as caught:
        pool(x, **GOOD[pool])
    assert caught.type is expected
    assert "input" in str(caught.value)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("input", [None, [[1.0]], np.ones((1, 1, 4, 4))], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("pool", GOOD, ids=lambda f: f.__name__)
def test_an_input_that_is_no_tensor_is_a_type_error(pool: Callable, input: Any):
    with pytest.raises(TypeError, match="input"):
        pool(input, **GOOD[pool])


@pytest.mark.parametrize("pool", GOOD, ids=lambda f: f.__name__)
def test_bool_and_complex_raise_what_pytorch_raises(pool: Callable):
    theirs = F.max_pool2d if pool is cf.median_pool2d else getattr(F, pool.__name__)
    for dtype in (torch.bool, torch.complex64):
        x = torch.ones(1, 1, 4, 4, dtype=dtype)
        assert class_of_error(pool, x, **GOOD[pool]) is class_of_error(theirs, x, **GOOD[pool])


@pytest.mark.parametrize("pool", GOOD, ids=lambda f: f.__name__)
def test_meta_inference_mode_autocast_and_checkpoint(pool: Callable):
    x = image((2, 3, 8, 8), torch.float32)
    y = pool(x, **GOOD[pool])
    meta = pool(x.to("meta"), **GOOD[pool])
    assert (meta.shape, meta.stride()) == (y.shape, y.stride())
    with torch.inference_mode():
        assert torch.equal(pool(x, **GOOD[pool]), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert pool(x, **GOOD[pool]).dtype == torch.float32
    leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    pool(leaf, **GOOD[pool]).sum().backward()
    torch.utils.checkpoint.checkpoint(lambda x: pool(x, **GOOD[pool]), again, use_reentrant=False).sum().backward()
    assert torch.equal(leaf.grad, again.grad)
