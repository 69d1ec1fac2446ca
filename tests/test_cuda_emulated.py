"""The CUDA kernels, emulated: what the rows of tests/test_kernels.py do not show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from references import FORMATS, empty, randn
from torch import Tensor

from cnnops._lib import C
from cnnops.ops import _activation

if not C.emulation:
    pytest.skip("this build has no emulated kernels (CMake option CNNOPS_EMULATION)", allow_module_level=True)

ROWS = {r["function"]: r["row"] for r in C.kernels() if r["isa"] == "cuda_emulated"}
IEEE, TF32, BF16 = range(3)
CONV = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)


def test_every_pass_and_dtype_on_the_cpu_has_a_row() -> None:
    wanted = {(r["op"], r["pass"], r["dtype"]) for r in C.kernels() if r["isa"] == "baseline" and r["op"] != "peak"}
    assert wanted <= {(r["op"], r["pass"], r["dtype"]) for r in C.kernels() if r["isa"] == "cuda_emulated"}


def test_they_are_never_chosen_by_themselves() -> None:
    assert not any(r["selected"] for r in C.kernels() if r["isa"] == "cuda_emulated")


def like(t: Tensor, channels: int) -> Tensor:
    """A result with so many channels, in the format of t."""
    format = torch.contiguous_format if t.is_contiguous() else torch.channels_last
    return empty(t.shape[0], channels, *t.shape[2:], dtype=t.dtype).contiguous(memory_format=format)


def forward(x: Tensor, weight: Tensor, precision: int = IEEE) -> Tensor:
    y = like(x, weight.shape[0])
    C.conv2d_forward(
        y, x, weight, None, None, **CONV, activation=0, threads=1, kernel=ROWS["conv2d_mma_forward_f32"],
        precision=precision,
    )  # fmt: skip
    return y


def input_grad(dy: Tensor, weight: Tensor, precision: int = IEEE) -> Tensor:
    dx = like(dy, weight.shape[1])
    C.conv2d_input_grad(
        dx, dy, weight, None, **CONV, threads=1, kernel=ROWS["conv2d_mma_input_grad_f32"], precision=precision
    )
    return dx


def weight_grad(dy: Tensor, x: Tensor, precision: int = IEEE) -> Tensor:
    dw = empty(dy.shape[1], x.shape[1], 3, 3, dtype=x.dtype)
    C.conv2d_weight_grad(dw, dy, x, **CONV, threads=1, kernel=ROWS["conv2d_mma_weight_grad_f32"], precision=precision)
    return dw


def exact(pass_: str, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    if pass_ == "forward":
        return F.conv2d(a, b, padding=1)
    if pass_ == "input_grad":
        return torch.nn.grad.conv2d_input((a.shape[0], b.shape[1], *a.shape[2:]), b, a, padding=1)
    return torch.nn.grad.conv2d_weight(b, (a.shape[1], b.shape[1], 3, 3), a, padding=1)


PASSES = {
    "forward": (forward, (1, 24, 9, 9), (20, 24, 3, 3)),
    "input_grad": (input_grad, (1, 20, 9, 9), (20, 24, 3, 3)),
    "weight_grad": (weight_grad, (1, 20, 9, 9), (1, 24, 9, 9)),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(("precision", "bits"), [(IEEE, 23), (TF32, 11), (BF16, 8)], ids=("ieee", "tf32", "bf16"))
def test_float32_products_carry_their_bits(pass_: str, precision: int, bits: int, format: str) -> None:
    """Each factor is off by at most 2^-bits; errors not far below that show that no more are kept than asked."""
    function, a_shape, b_shape = PASSES[pass_]
    a, b = (
        randn(*shape, dtype=torch.float32).contiguous(memory_format=FORMATS[format]) for shape in (a_shape, b_shape)
    )
    error = (function(a, b, precision).double() - exact(pass_, a, b)).abs()
    magnitude = exact(pass_, a.abs(), b.abs())
    worst = float((error / magnitude).max())
    assert worst <= 2.0 ** (1 - bits)
    if precision != IEEE:
        assert worst >= 2.0 ** -(bits + 8)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38], ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("precision", [IEEE, TF32], ids=("ieee", "tf32"))
def test_what_is_not_finite_or_huge_stays_so(pass_: str, value: float, which: int, precision: int) -> None:
    function, a_shape, b_shape = PASSES[pass_]
    inputs = [torch.randint(1, 5, shape).float() for shape in (a_shape, b_shape)]
    inputs[which].view(-1)[103] = value  # of weights a middle tap, which meets no padding: 0 * Inf
    got, expected = function(*inputs, precision), exact(pass_, *inputs).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-6 if precision == IEEE else 1e-3, atol=0)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("which", [0, 1])
def test_tiny_numbers_keep_their_bits(pass_: str, which: int) -> None:
    function, a_shape, b_shape = PASSES[pass_]
    inputs = [randn(*shape, dtype=torch.float32) for shape in (a_shape, b_shape)]
    inputs[which] *= 1e-36
    inputs[1 - which] *= 1e6
    error = (function(*inputs).double() - exact(pass_, *inputs)).abs()
    assert float((error / exact(pass_, *(t.abs() for t in inputs))).max()) <= 2.0**-20


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_a_reduction_are_added_up(format: str) -> None:
    """So many pixels that weight gradients are taken in parts; integers, so that the result is exact."""
    x = torch.randint(-3, 4, (2, 9, 24, 25)).float().contiguous(memory_format=FORMATS[format])
    dy = torch.randint(-3, 4, (2, 10, 24, 25)).float().contiguous(memory_format=FORMATS[format])
    expected = exact("weight_grad", dy, x)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for name in ("conv2d_mma_weight_grad", "conv2d_weight_grad"):
            row = ROWS.get(f"{name}_{ {torch.float32: 'f32', torch.float64: 'f64', torch.bfloat16: 'bf16'}[dtype] }")
            if row is None:
                continue
            dw = empty(10, 9, 3, 3, dtype=dtype)
            C.conv2d_weight_grad(dw, dy.to(dtype), x.to(dtype), **CONV, threads=1, kernel=row)
            assert torch.equal(dw, expected.to(dtype)), (name, dtype)


def test_statistics_far_from_zero() -> None:
    x = torch.randn(4, 3, 30, 40) + torch.tensor([1e4, -1e5, 0])[:, None, None]
    y, mean, var = torch.empty_like(x), torch.empty(3).double(), torch.empty(3).double()
    C.batch_norm_forward(
        y, mean, var, x, None, None, None, True, 1e-5, 0, threads=1, kernel=ROWS["batch_norm_training_f32"]
    )
    exact_var = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(var, exact_var, rtol=1e-5, atol=0)


def test_a_choice_outside_of_its_window_counts_as_none() -> None:
    dy, choice = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 254, dtype=torch.uint8)
    dx = torch.full((1, 1, 4, 4), 5.0)
    C.index_pool2d_gather(
        dy, dx, choice, (2, 2), (2, 2), (0, 0), (1, 1), threads=1, kernel=ROWS["index_pool2d_gather_f32"]
    )
    assert torch.equal(dy, torch.zeros_like(dy))


DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_depthwise_filters_of_every_size(size: int, stride: int, dtype: torch.dtype, format: str) -> None:
    """Integers, so that the results are exact."""

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape).to(dtype).contiguous(memory_format=FORMATS[format])

    x, weight, bias = integers(2, 24, 11, 10), integers(24, 1, size, size), torch.randint(-2, 3, (24,)).to(dtype)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(exact_x, exact_weight, bias.double(), stride, size // 2, 1, 24)
    dy, residual = integers(*y.shape), integers(*y.shape)
    dx, dw = torch.autograd.grad(y, (exact_x, exact_weight), dy.double())
    geometry = ((stride, stride), (size // 2,) * 2, (1, 1), 24)

    def row(name: str) -> int:
        return ROWS[f"conv2d_depthwise_{name}_{DTYPES[dtype]}"]

    got = [torch.full_like(t, 99) for t in (dy, x, weight)]
    C.conv2d_forward(got[0], x, weight, bias, residual, *geometry, activation=1, threads=1, kernel=row("forward"))
    C.conv2d_input_grad(got[1], dy, weight, None, *geometry, threads=1, kernel=row("input_grad"))
    C.conv2d_weight_grad(got[2], dy, x, *geometry, threads=1, kernel=row("weight_grad"))
    for a, b in zip(got, ((y + residual.double()).relu(), dx, dw), strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(2, 24, 7, 7), (3, 40, 4, 4), (2, 8, 30, 30), (1, 96, 5, 8), (2, 3, 40, 120)], ids=str
)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_batch_norm_of_every_tiling(shape: tuple[int, ...], activation: str, format: str) -> None:
    names = {
        "none": 0,
        "silu": _activation.index("batch_norm", "silu"),
        "gelu": _activation.index("batch_norm", "gelu"),
    }
    act = names[activation]
    functions = {"none": lambda z: z, "silu": F.silu, "gelu": F.gelu}
    x, dy = (randn(*shape, dtype=torch.float32, format=format) for _ in range(2))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = functions[activation](F.batch_norm(exact[0], None, None, exact[1], exact[2], True, eps=1e-5))
    gradients = torch.autograd.grad(expected, exact, dy.double())
    y, dx = torch.full_like(x, 99), torch.full_like(x, 99)
    mean, var = torch.empty(shape[1]).double(), torch.empty(shape[1]).double()
    dweight, dbias = torch.empty(shape[1]), torch.empty(shape[1])
    C.batch_norm_forward(
        y, mean, var, x, weight, bias, None, True, 1e-5, act, threads=1, kernel=ROWS["batch_norm_training_f32"]
    )
    C.batch_norm_backward(
        dx, dweight, dbias, None, dy, x, None, None, mean, var, weight, bias, True, 1e-5, act, threads=1,
        kernel=ROWS["batch_norm_backward_f32"],
    )  # fmt: skip
    for a, b in zip((y, dx, dweight, dbias), (expected, *gradients), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["conv2d_mma_weight_grad", "conv2d_weight_grad", "conv2d_depthwise_weight_grad"])
def test_gradients_of_an_empty_batch_are_zero(name: str, format: str) -> None:
    groups = 16 if "depthwise" in name else 1
    x, dy = (empty(0, 16, 9, 9, dtype=torch.float32, format=format) for _ in range(2))
    dw, db = empty(16, 16 // groups, 3, 3, dtype=x.dtype), empty(16, dtype=x.dtype)
    C.conv2d_weight_grad(dw, dy, x, **dict(CONV, groups=groups), threads=1, kernel=ROWS[f"{name}_f32"])
    C.conv2d_bias_grad(db, dy, threads=1, kernel=ROWS["conv2d_bias_grad_f32"])
    assert torch.equal(dw, torch.zeros_like(dw))
    assert torch.equal(db, torch.zeros_like(db))
