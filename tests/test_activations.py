"""The activations that kernels fuse: names, values over all exponents, derivatives, special values."""

from __future__ import annotations

import pytest
import torch
from place import DEVICE
from torch import Tensor

from cnnops._lib import C
from cnnops.ops import _activation

# Largest error in units of the last place (leaky_relu has a rounded slope and a rounded product). gelu and hardswish
# are products and sums that lose digits where the result is small beside what it is made of, in PyTorch as well: they
# are bounded relative to z instead.
ULPS = {"relu": 0, "relu6": 0, "leaky_relu": 1.1, "elu": 1, "sigmoid": 2.5, "tanh": 2.7, "softplus": 2, "silu": 3}


def sweep(dtype: torch.dtype) -> Tensor:
    """Every exponent, both signs, and the range where activations bend, densely."""
    wide = torch.logspace(-40, 30, 4001, dtype=torch.float64)
    z = torch.cat([torch.linspace(-25, 25, 40001, dtype=torch.float64), wide, -wide, torch.linspace(-104, -80, 999)])
    return z.to(dtype)


def rows(pass_: str, dtype: torch.dtype) -> list[dict]:
    wanted = ("batch_norm", pass_, str(dtype).removeprefix("torch."), True, DEVICE == "cuda")
    return [r for r in C.kernels() if (r["op"], r["pass"], r["dtype"], r["usable"], r["isa"] == "cuda") == wanted]


def activate(z: Tensor, activation: int, row: int = -1) -> Tensor:
    """By batch normalization with mean 0 and variance 1, which hands z on unchanged."""
    x = z.reshape(1, 1, 1, -1)
    y = torch.empty_like(x)
    mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    C.batch_norm_forward(y, mean.to(z.dtype), var.to(z.dtype), x, None, None, None, False, 0.0, activation, 1, row)
    return y.flatten()


def slope(z: Tensor, activation: int, row: int = -1, y: Tensor | None = None) -> Tensor:
    x = z.reshape(1, 1, 1, -1)
    dx, mean, var = torch.empty_like(x), torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    saved = None if y is None else y.reshape(x.shape)
    C.batch_norm_backward(
        dx, None, None, None, torch.ones_like(x), x, saved, None, mean, var, None, None, False, 0.0, activation, 1, row
    )
    return dx.flatten()


def true_slope(z: Tensor, activation: int) -> Tensor:
    z = z.double().requires_grad_()
    if _activation.NAMES[activation] == "silu":  # PyTorch's formula loses digits to 1 - sigmoid(z)
        return (torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))).detach()
    return torch.autograd.grad(_activation.apply(z, activation).sum(), z)[0]


def test_names_are_the_extensions() -> None:
    assert C.activations == list(_activation.NAMES)
    assert set(_activation.FUNCTIONS) == set(_activation.NAMES[1:])
    assert _activation.NAMES[0] == "none"


@pytest.mark.parametrize("name", ["Relu", "none", "swish", 3, ["relu"]])
def test_unknown_name_lists_the_known(name: object) -> None:
    with pytest.raises(ValueError, match=", ".join(_activation.NAMES[1:])):
        _activation.index("op", name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", _activation.NAMES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(name: str, dtype: torch.dtype) -> None:
    index, z = _activation.INDEX[name], sweep(dtype)
    expected = _activation.apply(z.double(), index)
    info = torch.finfo(dtype)
    # Beside float64 the truth, PyTorch's, is no better than the kernels; and it has silu(-720) = 0.
    double = dtype == torch.float64
    tiny = info.smallest_normal * (1 if double else 200 * info.eps if name == "silu" else 2 * info.eps)
    if name in ULPS:
        unit = info.eps * torch.exp2(expected.abs().clamp_min(info.smallest_normal).log2().floor())
        bound = ULPS[name] * (2 if double else 1) * unit + tiny
    else:
        size = z.double().abs()
        bound = 2 * info.eps * size * (1 + size / 3 if name == "hardswish" else 1) + tiny
    for row in rows("evaluation", dtype):
        got = activate(z, index, row["row"]).double()
        wrong = (got - expected).abs() > bound
        assert not wrong.any(), (row["isa"], z[wrong][:3], got[wrong][:3], expected[wrong][:3])


@pytest.mark.parametrize("name", _activation.NAMES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives(name: str, dtype: torch.dtype) -> None:
    index, z = _activation.INDEX[name], sweep(dtype)
    expected = true_slope(z, index)
    bound = 6 * torch.finfo(dtype).eps
    for row in rows("backward", dtype):
        got = slope(z, index, row["row"])
        assert (got - expected).abs().max() <= bound, row["isa"]
        if index in _activation.OUTPUT_IS_ENOUGH:
            y = activate(z, index)
            got = slope(z, index, row["row"], y)
            assert (got - expected).abs().max() <= bound, row["isa"]


@pytest.mark.parametrize("name", _activation.NAMES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values_as_pytorch(name: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    z = torch.tensor([nan, inf, -inf, 0.0, 6.0, -3.0, 3.0, 20.0, 21.0], dtype=dtype)
    index = _activation.INDEX[name]
    # PyTorch's float32 gelu gives NaN for Inf where its float64 gelu gives Inf.
    expected = _activation.apply(z.double(), index).to(dtype)
    for row in rows("evaluation", dtype):
        got = activate(z, index, row["row"])
        torch.testing.assert_close(got, expected, equal_nan=True)
    kinks = torch.tensor([0.0, 6.0, -3.0, 3.0], dtype=dtype)
    for row in rows("backward", dtype):
        torch.testing.assert_close(slope(kinks, index, row["row"]), true_slope(kinks, index).to(dtype))


def test_row_length_and_neighbours() -> None:
    """Tails of every length, and not a byte past the end."""
    for n in range(1, 70):
        buffer = torch.full((n + 16,), 7.0)
        z = torch.randn(n)
        out = buffer[:n].view(1, 1, 1, n)
        for row in rows("evaluation", torch.float32):
            C.batch_norm_forward(
                out, torch.zeros(1), torch.ones(1), z.view(1, 1, 1, n), None, None, None, False, 0.0, 8, 1, row["row"]
            )
            torch.testing.assert_close(out.flatten(), torch.nn.functional.silu(z))
            assert torch.equal(buffer[n:], torch.full((16,), 7.0))
