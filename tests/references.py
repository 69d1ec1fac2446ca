"""Oracles in float64, and the problems on which every row of the kernel tables is run.

``PROBLEMS[op, pass]`` is a list of functions ``problem(dtype, row) -> Check``: each builds inputs in ``dtype``, runs the
kernel table's row ``row`` (an index; -1 selects as users get it) through the extension, and returns what came out beside
what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops._lib import C

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PROBLEMS: dict[tuple[str, str], list[Callable[[torch.dtype, int], Check]]] = {}


@dataclass
class Check:
    """A result, the float64 truth, and the sum of the magnitudes of the terms of each element (None: of one term)."""

    got: Tensor
    expected: Tensor
    magnitude: Tensor | None = None

    def verify(self) -> None:
        """The error is at most 4 roundings of the storage type, and of float32 arithmetic over the terms."""
        got, expected = self.got.double(), self.expected.double()
        magnitude = expected.abs() if self.magnitude is None else self.magnitude.double()
        compute = torch.float64 if self.got.dtype == torch.float64 else torch.float32
        tiny = torch.finfo(self.got.dtype).smallest_normal
        bound = (
            4 * torch.finfo(compute).eps * magnitude + torch.finfo(self.got.dtype).eps * expected.abs() + tiny
        )
        assert torch.equal(got.isnan(), expected.isnan()), "NaNs differ"
        wrong = ((got - expected).abs() > bound) & (got != expected) & ~expected.isnan()
        if wrong.any():
            at = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, first at {at}: "
                f"got {float(got[at])!r}, expected {float(expected[at])!r}, allowed error {float(bound[at]):.3g}"
            )


def problem(op: str, pass_: str) -> Callable[[Callable[..., Iterator[Callable]]], Callable]:
    """Registers a generator of problems."""

    def register(generator: Callable[..., Iterator[Callable]]) -> Callable:
        PROBLEMS.setdefault((op, pass_), []).extend(generator())
        return generator

    return register


def randn(*shape: int, dtype: torch.dtype, format: str = "nchw") -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=FORMATS[format])


def empty(*shape: int, dtype: torch.dtype, format: str = "nchw") -> Tensor:
    """An output, filled with a value that no test expects, so that an element left out is seen."""
    return torch.full(shape, 1234.0, dtype=dtype).contiguous(memory_format=FORMATS[format])


AVG_POOLS = (
    dict(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), count_include_pad=True, divisor=0),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 1), count_include_pad=False, divisor=0),
    dict(kernel_size=(5, 5), stride=(3, 4), padding=(2, 2), count_include_pad=True, divisor=7),
)


@problem("avg_pool2d", "forward")
def _avg_pool2d_forward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], pool: dict) -> Check:
        x = randn(*shape, dtype=dtype, format=format)
        pool = dict(pool)
        oracle = dict(pool, divisor_override=pool["divisor"] or None)
        del oracle["divisor"]
        expected = F.avg_pool2d(x.double(), **oracle)
        y = empty(*expected.shape, dtype=dtype, format=format)
        C.avg_pool2d_forward(y, x, **pool, threads=2, kernel=row)
        return Check(y, expected, F.avg_pool2d(x.double().abs(), **oracle))

    for format in FORMATS:
        for shape in ((2, 3, 9, 11), (1, 37, 8, 8)):
            for pool in AVG_POOLS:
                yield partial(run, format=format, shape=shape, pool=pool)


@problem("avg_pool2d", "backward")
def _avg_pool2d_backward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], pool: dict) -> Check:
        oracle = dict(pool, divisor_override=pool["divisor"] or None)
        del oracle["divisor"]
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = F.avg_pool2d(x, **oracle)
        dy = randn(*y.shape, dtype=dtype, format=format)
        (expected,) = torch.autograd.grad(y, x, dy.double(), retain_graph=True)
        (magnitude,) = torch.autograd.grad(y, x, dy.double().abs())
        dx = empty(*shape, dtype=dtype, format=format)
        C.avg_pool2d_backward(dx, dy, **pool, threads=2, kernel=row)
        return Check(dx, expected, magnitude)

    for format in FORMATS:
        for shape in ((2, 3, 9, 11), (1, 37, 8, 8)):
            for pool in AVG_POOLS:
                yield partial(run, format=format, shape=shape, pool=pool)
