"""locally_connected2d: values, gradients, padding, memory formats, errors, and what torch wants of an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE
from references import locally_connected2d_oracle
from torch import Tensor
from torch.autograd import forward_ad

from cnnops.functional import locally_connected2d
from cnnops.ops._padding import resolve

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS_FACTOR = 60  # products of a sum, and the rounding of the result


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("per_position", [True, False])
def test_values_and_gradients(dtype: torch.dtype, format: torch.memory_format, per_position: bool) -> None:
    x = leaf(3, 5, 8, 7, dtype=dtype).detach().contiguous(memory_format=format).requires_grad_()
    weight, bias = leaf(4, 7, 6, 5, 3, 3, dtype=dtype), leaf(*((6, 4, 7) if per_position else (6,)), dtype=dtype)
    y = locally_connected2d(x, weight, bias, stride=(2, 1), padding="same")
    truth = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    conv = {"padding": resolve("op", "same", (8, 7), (3, 3), (2, 1), (1, 1)), "stride": (2, 1), "dilation": (1, 1)}
    expected = locally_connected2d_oracle(*truth[:2], conv)
    expected = expected + (truth[2] if per_position else truth[2][:, None, None])
    assert y.is_contiguous(memory_format=format)
    dy = torch.randn(y.shape).to(dtype)
    results = [y, *torch.autograd.grad(y, (x, weight, bias), dy)]
    right = [expected, *torch.autograd.grad(expected, truth, dy.double())]
    bound = max(EPS_FACTOR * torch.finfo(dtype).eps, 1e-12)
    for got, value in zip(results, right, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), value, atol=bound * float(value.detach().abs().max()) / 10, rtol=bound / 10
        )
    assert results[1].is_contiguous(memory_format=format)


@pytest.mark.parametrize("padding", [0, 2, (1, 3), "valid", "same", "full"])
@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_with_equal_filters_it_is_a_convolution(
    padding: int | tuple[int, int] | str, stride: int | tuple[int, int], dilation: int | tuple[int, int]
) -> None:
    pair = [(v, v) if isinstance(v, int) else v for v in (stride, dilation)]
    x, filters = torch.randint(-4, 5, (2, 3, 9, 10)).float(), torch.randint(-4, 5, (4, 3, 3, 2)).float()
    top, bottom, left, right = resolve("op", padding, (9, 10), (3, 2), *pair)
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), filters, stride=stride, dilation=dilation)
    weight = filters.expand(*expected.shape[2:], *filters.shape)
    assert torch.equal(locally_connected2d(x, weight, None, stride, padding, dilation), expected)
    if padding == "same":
        assert expected.shape[2:] == (-(-9 // pair[0][0]), -(-10 // pair[0][1]))
        if stride == 1:
            assert torch.equal(F.conv2d(x, filters, padding="same", dilation=dilation), expected)
    if padding == "full":
        assert (top, bottom, left, right) == (2 * pair[1][0],) * 2 + (pair[1][1],) * 2


def test_layouts_rank_and_empty_batch() -> None:
    weight = torch.randn(3, 4, 5, 2, 3, 3)
    x = torch.randn(2, 2, 5, 6)
    y = locally_connected2d(x, weight)
    strided = torch.randn(2, 2, 10, 6)[:, :, ::2].copy_(x)
    torch.testing.assert_close(locally_connected2d(strided, weight), y)
    torch.testing.assert_close(locally_connected2d(x.transpose(2, 3).contiguous().transpose(2, 3), weight), y)
    apart = torch.randn(3, 4, 5, 2, 3, 6)[..., ::2].copy_(weight)
    torch.testing.assert_close(locally_connected2d(x, apart), y)
    torch.testing.assert_close(locally_connected2d(x[0], weight), y[0])
    none = torch.randn(0, 2, 5, 6, requires_grad=True)
    weight.requires_grad_()
    empty = locally_connected2d(none, weight, torch.randn(5))
    assert empty.shape == (0, 5, 3, 4)
    dx, dw = torch.autograd.grad(empty.sum(), (none, weight))
    assert dx.shape == none.shape
    assert not dw.any()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits_for_any_number_of_threads(format: torch.memory_format) -> None:
    results, threads = [], torch.get_num_threads()
    weight, bias = torch.randn(9, 9, 17, 6, 3, 3, requires_grad=True), torch.randn(17, 9, 9)
    x = torch.randn(20, 6, 11, 11).contiguous(memory_format=format).requires_grad_()
    dy = torch.randn(20, 17, 9, 9)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            y = locally_connected2d(x, weight, bias)
            results.append([y, *torch.autograd.grad(y, (x, weight), dy)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_inf_reach_what_they_should() -> None:
    x, weight = torch.zeros(1, 1, 4, 4), torch.ones(3, 3, 1, 1, 2, 2)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = float("nan"), float("inf")
    y = locally_connected2d(x, weight)[0, 0]
    assert y.isnan().nonzero().tolist() == [[0, 0]]
    assert y.isinf().nonzero().tolist() == [[2, 2]]


X, W = torch.ones(2, 3, 5, 5), torch.ones(3, 3, 4, 3, 3, 3)
BAD: dict[str, tuple[type[Exception], str, Callable[[], Tensor]]] = {
    "rank of the input": (RuntimeError, "input", lambda: locally_connected2d(X[0, 0], W)),
    "rank of the weight": (RuntimeError, "weight", lambda: locally_connected2d(X, W[0])),
    "channels": (RuntimeError, "3 channels", lambda: locally_connected2d(X[:, :2], W)),
    "positions": (RuntimeError, "4 x 3 output positions", lambda: locally_connected2d(torch.ones(2, 3, 6, 5), W)),
    "stride 0": (RuntimeError, "stride", lambda: locally_connected2d(X, W, stride=0)),
    "dilation 0": (RuntimeError, "dilation", lambda: locally_connected2d(X, W, dilation=(1, 0))),
    "negative padding": (RuntimeError, "padding", lambda: locally_connected2d(X, W, padding=-1)),
    "unknown padding": (RuntimeError, "valid", lambda: locally_connected2d(X, W, padding="SAME")),
    "padding of a float": (TypeError, "padding", lambda: locally_connected2d(X, W, padding=1.5)),
    "stride of three": (RuntimeError, "stride", lambda: locally_connected2d(X, W, stride=(1, 1, 1))),
    "kernel too large": (RuntimeError, "larger", lambda: locally_connected2d(X[:, :, :2], W)),
    "bias of the wrong length": (RuntimeError, "bias", lambda: locally_connected2d(X, W, torch.ones(3))),
    "bias of the wrong shape": (RuntimeError, "bias", lambda: locally_connected2d(X, W, torch.ones(4, 3, 2))),
    "dtype of the weight": (RuntimeError, "weight", lambda: locally_connected2d(X, W.double())),
    "dtype of the bias": (RuntimeError, "bias", lambda: locally_connected2d(X, W, torch.ones(4).double())),
    "device": (RuntimeError, "weight", lambda: locally_connected2d(X, W.to("meta"))),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_calls(bad: str) -> None:
    kind, match, call = BAD[bad]
    with pytest.raises(kind, match=match):
        call()


def test_other_dtypes_go_through_pytorch() -> None:
    # On CUDA, PyTorch multiplies no matrices of integers.
    x, weight = (torch.randint(-3, 4, shape, device="cpu") for shape in ((2, 3, 5, 5), (3, 3, 4, 3, 3, 3)))
    assert torch.equal(locally_connected2d(x, weight), locally_connected2d(x.double(), weight.double()).long())


@pytest.mark.parametrize("bias", [None, (2,), (2, 3, 2)])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": (1, 2), "padding": "same"}, {"dilation": 2, "padding": 1}], ids=str
)
def test_gradients_of_any_order(bias: tuple[int, ...] | None, geometry: dict) -> None:
    size = {(): (4, 3), ("stride", "padding"): (3, 3), ("dilation", "padding"): (3, 2)}[tuple(geometry)]
    x, weight = leaf(2, 2, *size), leaf(3, 2, 2, 2, 2, 2)
    tensors = [x, weight, *([] if bias is None else [leaf(*bias)])]

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return locally_connected2d(x, weight, bias, **geometry)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(format: torch.memory_format) -> None:
    ops = torch.ops.cnnops
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=format).requires_grad_()
    w, dy = torch.randn(3, 2, 4, 3, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 2).contiguous(memory_format=format)
    geometry = ([2, 2], [1, 0], [1, 1])
    for bias in (None, torch.randn(4, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)):
        torch.library.opcheck(ops.locally_connected2d.default, (x, w, bias, *geometry))
    dy.requires_grad_()
    torch.library.opcheck(ops.locally_connected2d_input_grad.default, (dy, w, 5, 6, *geometry))
    torch.library.opcheck(ops.locally_connected2d_weight_grad.default, (dy, x, 3, 3, *geometry))


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5, 5), (3, 3, 4, 3, 3, 3), (4,)))

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return locally_connected2d(x, w, b).relu().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [[f(x, w, b), *torch.autograd.grad(f(x, w, b), (x, w, b))] for f in (function, compiled)]
    torch.testing.assert_close(*results)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return locally_connected2d(x, w.detach())

    program = torch.export.export(Module(), (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), locally_connected2d(x, w))


def test_func_transforms() -> None:
    xs, ws, b = torch.randn(4, 2, 3, 5, 5), torch.randn(4, 3, 3, 4, 3, 3, 3), torch.randn(4)
    each = [locally_connected2d(x, ws[0], b) for x in xs]
    torch.testing.assert_close(torch.vmap(lambda x: locally_connected2d(x, ws[0], b))(xs), torch.stack(each))
    each = [locally_connected2d(x, w, b) for x, w in zip(xs, ws, strict=True)]
    torch.testing.assert_close(torch.vmap(lambda x, w: locally_connected2d(x, w, b))(xs, ws), torch.stack(each))

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return locally_connected2d(x, w, b).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(ws[0], xs)
    leaf = ws[0].clone().requires_grad_()
    each = [torch.autograd.grad(loss(leaf, x), leaf)[0] for x in xs]
    torch.testing.assert_close(got, torch.stack(each))
    hessian = torch.func.hessian(lambda w: locally_connected2d(xs[0, :, :1], w).square().sum())(ws[0, :, :, :1, :1])
    assert hessian.shape == ws[0, :, :, :1, :1].shape * 2
    torch.testing.assert_close(hessian.flatten(0, 5).flatten(1), hessian.flatten(0, 5).flatten(1).T)


def test_forward_mode() -> None:
    x, t, w = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(3, 3, 4, 3, 3, 3)
    with forward_ad.dual_level():
        y = locally_connected2d(forward_ad.make_dual(x, t), w)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, locally_connected2d(t, w))
    torch.testing.assert_close(
        torch.func.jvp(lambda x: locally_connected2d(x, w), (x,), (t,))[1], locally_connected2d(t, w)
    )


def test_inference_autocast_and_meta() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(3, 3, 4, 3, 3, 3)
    y = locally_connected2d(x, w)
    with torch.inference_mode():
        assert torch.equal(locally_connected2d(x, w), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        low = locally_connected2d(x, w)
        assert low.dtype == torch.bfloat16
        assert torch.equal(locally_connected2d(x.bfloat16(), w, torch.zeros(4)), low)
    assert locally_connected2d(x.to("meta"), w.to("meta")).shape == y.shape
