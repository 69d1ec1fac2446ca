"""3x3 convolution by Winograd's filtering: as good as a sum of products, for every kind of data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops._lib import C
from cnnops.ops.conv2d import conv2d_input_grad, conv2d_op, conv2d_weight_grad

FORMATS = (torch.contiguous_format, torch.channels_last)
GEOMETRY = ([1, 1], [1] * 4, [1, 1], 1)
PASSES = ("forward", "input_grad", "weight_grad")


def run(name: str, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    if name == "forward":
        return conv2d_op(x, w, None, None, *GEOMETRY, 0)
    if name == "input_grad":
        return conv2d_input_grad(dy, w, None, *x.shape[2:], *GEOMETRY)
    return conv2d_weight_grad(dy, x, 3, 3, *GEOMETRY, x.is_contiguous(memory_format=torch.channels_last))


def direct(name: str, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    """The same by the row of the generic kernel at the highest usable level."""
    levels = {level["isa"] for level in C.isa_levels()}
    rows = [r for r in C.kernels() if r["function"] == f"conv2d_{name}_f32" and r["usable"] and r["isa"] in levels]
    format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    arguments = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, threads=2, kernel=rows[0]["row"])
    if name == "forward":
        out = torch.empty_like(dy)
        C.conv2d_forward(out, x, w, None, None, activation=0, **arguments)
    elif name == "input_grad":
        out = torch.empty_like(x)
        C.conv2d_input_grad(out, dy, w, None, **arguments)
    else:
        out = torch.empty_like(w, memory_format=format)
        C.conv2d_weight_grad(out, dy, x, **arguments)
    return out


def truth(name: str, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    x, w, dy = x.double(), w.double(), dy.double()
    if name == "forward":
        return F.conv2d(x, w, None, 1, 1)
    if name == "input_grad":
        return torch.nn.grad.conv2d_input(x.shape, w, dy, 1, 1)
    return torch.nn.grad.conv2d_weight(x, w.shape, dy, 1, 1)


def tensors(
    format: torch.memory_format, n: int = 5, c: int = 40, k: int = 56, h: int = 20, w: int = 17
) -> list[Tensor]:
    shapes = ((n, c, h, w), (k, c, 3, 3), (n, k, h, w))
    return [torch.randn(s).contiguous(memory_format=format) for s in shapes]


def wide(t: Tensor) -> Tensor:
    return t.sign() * 10 ** (torch.rand_like(t) * 24 - 12)


DATA: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "normal": lambda x, w, dy: (x, w, dy),
    "positive": lambda x, w, dy: (x.abs(), w.abs(), dy.abs()),
    "far from zero": lambda x, w, dy: (x + 100, w, dy + 100),
    "of every size": lambda x, w, dy: (wide(x), w, wide(dy)),
    "of every size, filters too": lambda x, w, dy: (wide(x), wide(w), wide(dy)),
    "half the image black": lambda x, w, dy: (
        x * (torch.arange(x.shape[3]) > 8),
        w,
        dy * (torch.arange(x.shape[3]) > 8),
    ),
    "one tap": lambda x, w, dy: (x, w * (torch.arange(9).view(3, 3) == 2), dy),
    "huge": lambda x, w, dy: (x * 1e20, w, dy * 1e10),
    "tiny": lambda x, w, dy: (x * 1e-25, w, dy * 1e-8),
    "zero": lambda x, w, dy: (x * 0, w, dy * 0),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("data", DATA)
def test_every_element_is_within_the_bound_of_a_sum_of_products(
    data: str, name: str, format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    case = [t.contiguous(memory_format=format) for t in DATA[data](*tensors(format))]
    got, expected = run(name, *case).double(), truth(name, *case)
    magnitude = truth(name, *(t.abs() for t in case))
    # What a chain of multiply-adds keeps in practice; PyTorch needs up to 50 for positive data.
    assert ((got - expected).abs() <= 16 * torch.finfo(torch.float32).eps * magnitude + 1e-44).all()
    if data in ("half the image black", "zero"):
        assert (got[expected == 0] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 7, 9, 16), (2, 39, 19, 8)])
def test_what_is_not_finite_stays_where_it_belongs(
    place: tuple, value: float, name: str, format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x, w, dy = tensors(format)
    x[place] = value
    dy[place] = value
    assert torch.equal(run(name, x, w, dy).nan_to_num(5e5, 6e5, 7e5), direct(name, x, w, dy).nan_to_num(5e5, 6e5, 7e5))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PASSES)
def test_it_is_what_runs_on_fit_data(name: str, format: torch.memory_format) -> None:
    torch.manual_seed(0)
    case = tensors(format)
    assert not torch.equal(run(name, *case), direct(name, *case))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("size", [dict(n=2, c=80, k=144, h=14, w=13), dict(n=1, c=160, k=200, h=30, w=30)])
def test_any_number_of_threads_gives_the_same_bits(name: str, size: dict, format: torch.memory_format) -> None:
    case = tensors(format, **size)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(name, *case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
