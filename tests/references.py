"""Oracles in float64, and the problems on which every row of the kernel tables is run.

``PROBLEMS[op, pass]`` is a list of functions ``problem(dtype, row) -> Check``: each builds inputs in ``dtype``, runs
the kernel table's row ``row`` (an index; -1 selects as users get it) through the extension, and returns what came out
beside what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops._lib import C

GUARD = 64  # elements before and after an output
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PROBLEMS: dict[tuple[str, str], list[Callable[[torch.dtype, int], Check]]] = {}


class OnDevice:
    """The extension, for problems on the CPU whose kernel is not: tensors go to the device for the call, and what it
    wrote comes back."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.extension, name)
        if isinstance(function, type):
            return function

        def call(*args: Any, **kwargs: Any) -> None:
            there = [a.to("cuda") if isinstance(a, Tensor) else a for a in args]
            function(*there, **kwargs)
            torch.cuda.synchronize()
            for here, moved in zip(args, there, strict=True):
                if isinstance(here, Tensor):
                    here.copy_(moved)

        return call


@dataclass
class Check:
    """A result, the float64 truth, and the sum of the magnitudes of the terms of each element (None: of one term)."""

    got: Tensor
    expected: Tensor
    magnitude: Tensor | None = None

    def verify(self) -> None:
        """The error is at most 4 roundings of the storage type, and of float32 arithmetic over the terms."""
        if self.got.storage_offset() == GUARD:
            whole = self.got.as_strided((self.got.numel() + 2 * GUARD,), (1,), 0)
            around = torch.cat((whole[:GUARD], whole[-GUARD:]))
            assert torch.equal(around, torch.full_like(around, 1234.0)), "written beyond the output's ends"
        got, expected = self.got.double(), self.expected.double()
        magnitude = expected.abs() if self.magnitude is None else self.magnitude.double()
        compute = torch.float64 if self.got.dtype == torch.float64 else torch.float32
        tiny = torch.finfo(self.got.dtype).smallest_normal
        bound = 4 * torch.finfo(compute).eps * magnitude + torch.finfo(self.got.dtype).eps * expected.abs() + tiny
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
    if format == "turned":  # columns are farther apart than rows
        return randn(*shape[:2], shape[3], shape[2], dtype=dtype).transpose(2, 3)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=FORMATS[format]) if x.dim() == 4 else x


def empty(*shape: int, dtype: torch.dtype, format: str = "nchw") -> Tensor:
    """An output, filled and surrounded with a value that no test expects, so that an element left out is seen, and one
    written beyond its ends."""
    like = torch.empty(shape, device="meta")
    like = like.contiguous(memory_format=FORMATS[format]) if like.dim() == 4 else like
    whole = torch.full((like.numel() + 2 * GUARD,), 1234.0, dtype=dtype)
    return whole.as_strided(shape, like.stride(), GUARD)


AVG_POOLS = (
    dict(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0), count_include_pad=True, divisor=0),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 1), count_include_pad=False, divisor=0),
    dict(kernel_size=(5, 5), stride=(3, 4), padding=(2, 2), count_include_pad=True, divisor=7),
    dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), count_include_pad=True, divisor=0),
    dict(kernel_size=(3, 7), stride=(2, 3), padding=(0, 2), count_include_pad=False, divisor=0),
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
        for shape in ((2, 3, 9, 11), (1, 37, 8, 8), (1, 65, 13, 37)):
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
        for shape in ((2, 3, 9, 11), (1, 37, 8, 8), (1, 65, 13, 37)):
            for pool in AVG_POOLS:
                yield partial(run, format=format, shape=shape, pool=pool)


@problem("adaptive_avg_pool2d", "forward")
def _adaptive_avg_pool2d_forward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], size: tuple) -> Check:
        x = randn(*shape, dtype=dtype, format=format)
        expected = F.adaptive_avg_pool2d(x.double(), size)
        y = empty(*expected.shape, dtype=dtype, format=format)
        C.adaptive_avg_pool2d_forward(y, x, threads=2, kernel=row)
        return Check(y, expected, F.adaptive_avg_pool2d(x.double().abs(), size))

    for format in FORMATS:
        for shape in ((2, 3, 17, 19), (1, 75, 8, 8), (1, 1, 40, 33)):
            for size in ((1, 1), (2, 3), (4, 4), (5, 7), (20, 20)):
                yield partial(run, format=format, shape=shape, size=size)


@problem("adaptive_avg_pool2d", "backward")
def _adaptive_avg_pool2d_backward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], size: tuple) -> Check:
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = F.adaptive_avg_pool2d(x, size)
        dy = randn(*y.shape, dtype=dtype, format=format)
        (expected,) = torch.autograd.grad(y, x, dy.double(), retain_graph=True)
        (magnitude,) = torch.autograd.grad(y, x, dy.double().abs())
        dx = empty(*shape, dtype=dtype, format=format)
        C.adaptive_avg_pool2d_backward(dx, dy, threads=2, kernel=row)
        return Check(dx, expected, magnitude)

    for format in FORMATS:
        for shape in ((2, 3, 17, 19), (1, 75, 8, 8), (1, 1, 40, 33)):
            for size in ((1, 1), (2, 3), (4, 4), (5, 7), (20, 20)):
                yield partial(run, format=format, shape=shape, size=size)


def pool(kernel_size: tuple, stride: tuple, padding: tuple = (0, 0), dilation: tuple = (1, 1)) -> dict:
    return dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)


PICK_POOLS = (
    pool((2, 2), (2, 2)),
    pool((3, 3), (2, 2), (1, 1)),
    pool((3, 3), (1, 1), (1, 1)),
    pool((3, 2), (2, 3), (1, 0), (2, 1)),
    pool((5, 4), (4, 1), (2, 2), (2, 2)),
    pool((1, 3), (1, 4)),
    pool((8, 8), (8, 8)),
    pool((4, 4), (8, 2), (2, 1), (2, 2)),
    pool((3, 3), (2, 2)),
    pool((3, 3), (2, 2), (1, 1), (2, 2)),
    pool((5, 5), (1, 1), (2, 2)),
    pool((3, 3), (4, 3), (1, 1)),
    pool((2, 2), (4, 5), (1, 1), (2, 3)),
)
PICK_SHAPES = ((2, 3, 17, 19), (1, 37, 8, 8), (1, 2, 9, 67))
# So many planes that they are not cut into units; those of the second are of more rows than are worked on at a time.
MANY_PLANES, MANY_TALL_PLANES = (1, 64, 9, 21), (1, 64, 67, 40)


ADAPTIVE_SIZES = ((1, 1), (2, 3), (4, 4), (5, 7), (20, 20))
# Channels for several vectors at once of every type and instruction set, and a tail.
MANY_CHANNELS = (1, 149, 8, 9)


def pick_input(shape: tuple[int, ...], dtype: torch.dtype, format: str) -> Tensor:
    """Small integers, so that there are ties, some of them NaN and Inf."""
    x = torch.randint(-9, 10, shape).double()
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(shape) < 0.02] = value
    return x.to(dtype).contiguous(memory_format=FORMATS[format])


def offsets_of(indices: Tensor, width: int, pool: dict) -> Tensor:
    """Plane indices h * W + w as offsets r * kernel_w + s within their windows."""
    p = torch.arange(indices.shape[2]).view(-1, 1)
    q = torch.arange(indices.shape[3])
    (_, kernel_w), stride, padding, dilation = pool.values()
    r = (indices // width - p * stride[0] + padding[0]) // dilation[0]
    s = (indices % width - q * stride[1] + padding[1]) // dilation[1]
    return r * kernel_w + s


def choice_of(indices: Tensor, mode: str, width: int, pool: dict, format: str) -> Tensor:
    choice = offsets_of(indices, width, pool).to(torch.uint8) if mode == "offsets" else indices
    return choice.contiguous(memory_format=FORMATS[format])


def run_pick(
    forward: Callable, x: Tensor, y: Tensor, indices: Tensor, mode: str, pool: dict, format: str, row: int
) -> Check:
    """Runs a picking pooling; what came out and what is right are the result and the choice in one."""
    got = empty(*y.shape, dtype=x.dtype, format=format)
    if mode == "none":
        forward(got, None, x, **pool, threads=2, kernel=row)
        return Check(got.double(), y)
    expected = choice_of(indices, mode, x.shape[3], pool, format)
    choice = torch.full_like(expected, 77)
    forward(got, choice, x, **pool, threads=2, kernel=row)
    return Check(torch.cat([got.double(), choice.double()]), torch.cat([y, expected.double()]))


@problem("max_pool2d", "forward")
def _max_pool2d_forward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], pool: dict, mode: str) -> Check:
        x = pick_input(shape, dtype, format)
        y, indices = F.max_pool2d(x.double(), **pool, return_indices=True)
        return run_pick(C.max_pool2d_forward, x, y, indices, mode, pool, format, row)

    for format in FORMATS:
        for shape in (*PICK_SHAPES, MANY_TALL_PLANES, MANY_CHANNELS):
            for pool in PICK_POOLS:
                for mode in ("none", "offsets", "indices"):
                    yield partial(run, format=format, shape=shape, pool=pool, mode=mode)


@problem("adaptive_max_pool2d", "forward")
def _adaptive_max_pool2d_forward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], size: tuple) -> Check:
        x = pick_input(shape, dtype, format)
        expected, index = F.adaptive_max_pool2d(x.double(), size, return_indices=True)
        y = empty(*expected.shape, dtype=dtype, format=format)
        indices = torch.full_like(y, 77, dtype=torch.int64)
        C.adaptive_max_pool2d_forward(y, indices, x, threads=2, kernel=row)
        return Check(torch.cat([y.double(), indices.double()]), torch.cat([expected, index.double()]))

    for format in FORMATS:
        for shape in (*PICK_SHAPES, MANY_CHANNELS):
            for size in ADAPTIVE_SIZES:
                yield partial(run, format=format, shape=shape, size=size)


def median_pool2d(
    x: Tensor, kernel_size: tuple, stride: tuple, padding: tuple, dilation: tuple
) -> tuple[Tensor, Tensor]:
    """Medians and where they are, one window at a time."""
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    y = torch.empty(*x.shape[:2], *sizes, dtype=torch.float64)
    indices = torch.empty(y.shape, dtype=torch.int64)
    for p, q in product(*map(range, sizes)):
        rows, columns = (
            [
                c
                for r in range(kernel_size[i])
                if 0 <= (c := o * stride[i] - padding[i] + r * dilation[i]) < x.shape[2 + i]
            ]
            for i, o in ((0, p), (1, q))
        )
        cells = x[:, :, rows][:, :, :, columns].flatten(2).numpy()
        for n, c in product(range(x.shape[0]), range(x.shape[1])):
            values = cells[n, c].tolist()
            ordered = sorted(values)
            at = next((i for i, v in enumerate(values) if v != v), None)
            if at is None:
                at = values.index(ordered[(len(values) - 1) // 2])
            y[n, c, p, q] = values[at]
            indices[n, c, p, q] = rows[at // len(columns)] * x.shape[3] + columns[at % len(columns)]
    return y, indices


MEDIAN_POOLS = (*PICK_POOLS, pool((5, 5), (2, 2), (2, 2)), pool((1, 1), (1, 1)))
MEDIAN_LARGE = pool((13, 11), (3, 2), (6, 5))


@cache
def median_case(shape: tuple[int, ...], dtype: torch.dtype, which: int) -> tuple[Tensor, Tensor, Tensor, dict]:
    """An input, its medians and their indices: worked out once for all rows, since this takes a while."""
    pool = (*MEDIAN_POOLS, MEDIAN_LARGE)[which]
    x = pick_input(shape, dtype, "nchw")
    return x, *median_pool2d(x.double(), **pool), pool


@problem("median_pool2d", "forward")
def _median_pool2d_forward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], which: int, mode: str) -> Check:
        x, y, indices, pool = median_case(shape, dtype, which)
        x = x.contiguous(memory_format=FORMATS[format])
        return run_pick(C.median_pool2d_forward, x, y, indices, mode, pool, format, row)

    for format in FORMATS:
        for which in range(len(MEDIAN_POOLS)):
            for shape in ((2, 3, 17, 19), (1, 18, 9, 9)):
                for mode in ("none", "offsets", "indices"):
                    yield partial(run, format=format, shape=shape, which=which, mode=mode)
        for mode in ("none", "offsets", "indices"):
            yield partial(run, format=format, shape=(1, 2, 17, 19), which=len(MEDIAN_POOLS), mode=mode)


def picks() -> Iterator[dict]:
    """The problems of index_pool2d."""
    for format in FORMATS:
        for shape in (*PICK_SHAPES, MANY_PLANES, MANY_TALL_PLANES):
            for pool in PICK_POOLS:
                for mode in ("offsets", "indices"):
                    yield dict(format=format, shape=shape, pool=pool, mode=mode)
        for shape in PICK_SHAPES[:2]:
            for size in ADAPTIVE_SIZES:
                yield dict(format=format, shape=shape, pool=size, mode="indices")


def picked(
    shape: tuple[int, ...], pool: dict | tuple, mode: str, format: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
    """An input, its max pooling (pool: windows, or an adaptive output size), the indices, the choice, the arguments."""
    x = torch.randint(-9, 10, shape).double().requires_grad_()
    if isinstance(pool, dict):
        y, indices = F.max_pool2d(x, **pool, return_indices=True)
        return x, y, indices, choice_of(indices, mode, shape[3], pool, format), pool
    y, indices = F.adaptive_max_pool2d(x, pool, return_indices=True)
    choice = indices.contiguous(memory_format=FORMATS[format])
    return x, y, indices, choice, dict(kernel_size=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1))


@problem("index_pool2d", "backward")
def _index_pool2d_backward() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], pool: dict, mode: str) -> Check:
        x, y, _, choice, arguments = picked(shape, pool, mode, format)
        dy = randn(*y.shape, dtype=dtype, format=format)
        (expected,) = torch.autograd.grad(y, x, dy.double(), retain_graph=True)
        (magnitude,) = torch.autograd.grad(y, x, dy.double().abs())
        dx = empty(*shape, dtype=dtype, format=format)
        C.index_pool2d_backward(dx, dy, choice, **arguments, threads=2, kernel=row)
        return Check(dx, expected, magnitude)

    for arguments in picks():
        yield partial(run, **arguments)


@problem("index_pool2d", "gather")
def _index_pool2d_gather() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, format: str, shape: tuple[int, ...], pool: dict, mode: str) -> Check:
        _, y, indices, choice, arguments = picked(shape, pool, mode, format)
        dx = randn(*shape, dtype=dtype, format=format)
        expected = dx.double().flatten(2).gather(2, indices.flatten(2)).view(y.shape)
        dy = empty(*y.shape, dtype=dtype, format=format)
        C.index_pool2d_gather(dy, dx, choice, **arguments, threads=2, kernel=row)
        return Check(dy, expected)

    for arguments in picks():
        yield partial(run, **arguments)


# ---- Convolution -----------------------------------------------------------------------------------------------------

# (x shape, K, (R, S), stride, padding, dilation, groups, P x Q may need more padding at the end)
CONVOLUTIONS = (
    dict(x=(2, 3, 11, 9), k=5, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(1, 20, 13, 17), k=37, rs=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=1),
    dict(x=(3, 8, 7, 7), k=70, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(2, 40, 14, 10), k=64, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(2, 12, 12, 9), k=18, rs=(5, 3), stride=(3, 2), padding=(4, 3), dilation=(2, 1), groups=3),
    dict(x=(1, 3, 32, 30), k=16, rs=(7, 7), stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=1),
    dict(x=(1, 300, 5, 4), k=33, rs=(1, 1), stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(2, 21, 12, 37), k=21, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=21),
    dict(x=(1, 17, 9, 8), k=17, rs=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=17),
    dict(x=(2, 33, 15, 14), k=33, rs=(5, 3), stride=(2, 2), padding=(2, 1), dilation=(1, 2), groups=33),
    dict(x=(1, 6, 9, 40), k=6, rs=(7, 7), stride=(1, 3), padding=(3, 9), dilation=(1, 1), groups=6),
    dict(x=(2, 16, 7, 7), k=16, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=16),
    dict(x=(1, 40, 7, 7), k=40, rs=(7, 7), stride=(1, 1), padding=(3, 3), dilation=(1, 1), groups=40),
    dict(x=(1, 100, 14, 14), k=100, rs=(5, 5), stride=(1, 1), padding=(2, 2), dilation=(1, 1), groups=100),
    dict(x=(2, 19, 9, 28), k=19, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=19),
    dict(x=(1, 24, 30, 61), k=24, rs=(5, 5), stride=(2, 2), padding=(2, 2), dilation=(1, 1), groups=24),
    dict(x=(1, 17, 16, 23), k=17, rs=(3, 9), stride=(1, 1), padding=(2, 4), dilation=(2, 1), groups=17),
    dict(x=(1, 18, 13, 20), k=18, rs=(4, 6), stride=(1, 2), padding=(0, 7), dilation=(1, 1), groups=18),
    dict(x=(1, 16, 40, 130), k=16, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=16),
    dict(x=(1, 33, 12, 13), k=33, rs=(3, 3), stride=(1, 1), padding=(4, 4), dilation=(4, 4), groups=33),
    dict(x=(2, 5, 11, 75), k=5, rs=(3, 3), stride=(1, 1), padding=(3, 2), dilation=(2, 2), groups=5),
    dict(x=(3, 3, 19, 50), k=3, rs=(5, 5), stride=(1, 1), padding=(0, 2), dilation=(1, 1), groups=3),
    dict(x=(1, 4, 18, 37), k=4, rs=(5, 5), stride=(1, 1), padding=(4, 4), dilation=(2, 2), groups=4),
    dict(x=(1, 4, 20, 45), k=4, rs=(7, 7), stride=(1, 1), padding=(5, 3), dilation=(1, 1), groups=4),
    dict(x=(2, 3, 13, 150), k=3, rs=(3, 3), stride=(2, 2), padding=(0, 1), dilation=(1, 1), groups=3),
    dict(x=(1, 3, 14, 131), k=3, rs=(5, 5), stride=(2, 2), padding=(4, 2), dilation=(1, 1), groups=3),
    dict(x=(1, 2, 1, 33), k=2, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2),
    dict(x=(2, 5, 9, 13), k=5, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=5),
    dict(x=(3, 4, 6, 8), k=4, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=4),
    dict(x=(1, 4, 10, 27), k=4, rs=(5, 5), stride=(1, 1), padding=(2, 2), dilation=(1, 1), groups=4),
    dict(x=(1, 3, 8, 29), k=3, rs=(7, 7), stride=(1, 1), padding=(3, 3), dilation=(1, 1), groups=3),
    dict(x=(2, 3, 12, 15), k=3, rs=(7, 7), stride=(1, 1), padding=(3, 3), dilation=(1, 1), groups=3),
    dict(x=(2, 4, 13, 25), k=4, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=4),
    dict(x=(1, 3, 11, 27), k=3, rs=(5, 5), stride=(2, 2), padding=(2, 2), dilation=(1, 1), groups=3),
    dict(x=(1, 32, 3, 2), k=32, rs=(7, 5), stride=(3, 3), padding=(3, 2), dilation=(1, 1), groups=32),
    dict(x=(2, 3, 9, 61), k=10, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(1, 5, 11, 42), k=8, rs=(7, 7), stride=(2, 3), padding=(3, 5), dilation=(2, 1), groups=1),
    dict(x=(2, 2, 37, 44), k=9, rs=(2, 3), stride=(1, 1), padding=(0, 2), dilation=(3, 2), groups=1),
    dict(x=(1, 3, 8, 124), k=9, rs=(4, 4), stride=(4, 4), padding=(0, 1), dilation=(1, 1), groups=1),
    dict(x=(1, 48, 5, 7), k=150, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(3, 20, 9, 7), k=24, rs=(1, 1), stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 4, 6, 6), k=8, rs=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=4),
    dict(x=(2, 32, 7, 9), k=32, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=8),
    dict(x=(1, 18, 9, 16), k=36, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=9),
    dict(x=(2, 21, 8, 8), k=35, rs=(3, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 2), groups=7),
    dict(x=(1, 42, 9, 8), k=7, rs=(2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=7),
    dict(x=(1, 28, 6, 19), k=28, rs=(3, 3), stride=(1, 1), padding=(2, 1), dilation=(1, 1), groups=4),
    dict(x=(1, 16, 30, 70), k=8, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=4),
    dict(x=(2, 16, 8, 9), k=32, rs=(3, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 1), groups=2),
    dict(x=(1, 50, 6, 5), k=20, rs=(1, 5), stride=(1, 1), padding=(0, 2), dilation=(1, 1), groups=10),
    dict(x=(1, 17, 41, 40), k=18, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(12, 33, 11, 13), k=20, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(3, 150, 7, 7), k=40, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(2, 48, 9, 6), k=64, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2),
    dict(x=(3, 70, 1, 1), k=37, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 9, 1, 1), k=130, rs=(1, 1), stride=(2, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(9, 24, 7, 5), k=40, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(11, 8, 6, 9), k=20, rs=(3, 5), stride=(2, 2), padding=(1, 3), dilation=(1, 2), groups=1),
    dict(x=(1, 2, 3, 5), k=3, rs=(2, 2), stride=(4, 5), padding=(1, 0), dilation=(1, 1), groups=1),
    dict(x=(2, 35, 13, 15), k=18, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(6, 16, 14, 13), k=17, rs=(3, 3), stride=(1, 1), padding=(2, 2), dilation=(2, 2), groups=1),
    dict(x=(2, 3, 19, 13), k=33, rs=(2, 4), stride=(3, 4), padding=(0, 2), dilation=(2, 1), groups=1),
    dict(x=(1, 7, 70, 10), k=140, rs=(3, 1), stride=(1, 3), padding=(1, 0), dilation=(3, 1), groups=1),
    dict(x=(1, 50, 9, 7), k=70, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(1, 64, 6, 10), k=49, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(25, 16, 8, 9), k=21, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(2, 48, 6, 6), k=50, rs=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(3, 17, 29, 56), k=21, rs=(2, 3), stride=(2, 3), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(3, 17, 10, 14), k=19, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(9, 16, 9, 11), k=18, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 22, 30, 28), k=17, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 16, 40, 42), k=21, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 16, 20, 20), k=165, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 200, 16, 27), k=16, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 130, 7, 7), k=150, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(2, 20, 9, 11), k=140, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(2, 33, 13, 12), k=34, rs=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1),
    dict(x=(1, 66, 15, 13), k=150, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(1, 64, 12, 38), k=65, rs=(3, 2), stride=(1, 3), padding=(1, 1), dilation=(1, 2), groups=1),
    dict(x=(5, 64, 9, 7), k=67, rs=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1),
    dict(x=(2, 64, 11, 18), k=70, rs=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=1),
)


WEIGHT_FORMATS = (None, "nchw", None, "nhwc", None, "turned")  # None: the image's


def _convolutions(run: Callable[..., Check], **variants: tuple) -> Iterator[Callable]:
    """Every convolution in both layouts, with one value of each variant in turn."""
    for i, conv in enumerate(CONVOLUTIONS):
        for j, format in enumerate(FORMATS):
            yield partial(run, conv=conv, format=format, **{k: v[(i + j) % len(v)] for k, v in variants.items()})


def _conv_shapes(conv: dict) -> tuple[tuple[int, ...], tuple[int, ...], dict]:
    """The weight's shape, y's shape, and the arguments of F.conv2d after the tensors."""
    n, c, h, w = conv["x"]
    arguments = {name: conv[name] for name in ("stride", "padding", "dilation", "groups")}
    size = [
        (length + 2 * pad - d * (taps - 1) - 1) // step + 1
        for length, pad, d, taps, step in zip(
            (h, w), conv["padding"], conv["dilation"], conv["rs"], conv["stride"], strict=True
        )
    ]
    return (conv["k"], c // conv["groups"], *conv["rs"]), (n, conv["k"], *size), arguments


ACTIVATED = (
    None,
    "relu",
    "gelu",
    "softplus",
    None,
    "hardswish",
    "leaky_relu",
    "tanh",
    "elu",
    "silu",
    "sigmoid",
    "relu6",
)


@problem("conv2d", "forward")
def _conv2d_forward() -> Iterator[Callable]:
    from cnnops.ops import _activation

    def run(
        dtype: torch.dtype,
        row: int,
        conv: dict,
        format: str,
        weight_format: str | None,
        bias: bool,
        residual: bool,
        act: str | None,
    ) -> Check:
        weight_shape, y_shape, arguments = _conv_shapes(conv)
        x = randn(*conv["x"], dtype=dtype, format=format)
        weight = randn(*weight_shape, dtype=dtype, format=weight_format or format)
        b = torch.randn(conv["k"]).to(dtype) if bias else None
        r = randn(*y_shape, dtype=dtype, format=format) if residual else None
        y = empty(*y_shape, dtype=dtype, format=format)
        C.conv2d_forward(y, x, weight, b, r, **arguments, activation=_activation.INDEX[act], threads=2, kernel=row)
        expected = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), **arguments)
        magnitude = F.conv2d(
            x.double().abs(), weight.double().abs(), None if b is None else b.double().abs(), **arguments
        )
        if r is not None:
            expected, magnitude = expected + r.double(), magnitude + r.double().abs()
        # No activation is steeper than 1.13 (gelu); theirs are a few roundings of their own.
        return Check(y, _activation.apply(expected, _activation.INDEX[act]), 2 * magnitude)

    yield from _convolutions(
        run, weight_format=WEIGHT_FORMATS, bias=(True, False, True), residual=(False, True, False, False), act=ACTIVATED
    )


@problem("conv2d", "input_grad")
def _conv2d_input_grad() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, conv: dict, format: str, weight_format: str | None, bias: bool) -> Check:
        weight_shape, y_shape, arguments = _conv_shapes(conv)
        weight = randn(*weight_shape, dtype=dtype, format=weight_format or format)
        dy = randn(*y_shape, dtype=dtype, format=format)
        b = torch.randn(conv["x"][1]).to(dtype) if bias else None
        dx = empty(*conv["x"], dtype=dtype, format=format)
        C.conv2d_input_grad(dx, dy, weight, b, **arguments, threads=2, kernel=row)
        expected = torch.nn.grad.conv2d_input(conv["x"], weight.double(), dy.double(), **arguments)
        magnitude = torch.nn.grad.conv2d_input(conv["x"], weight.double().abs(), dy.double().abs(), **arguments)
        if b is not None:
            expected, magnitude = expected + b.double()[:, None, None], magnitude + b.double().abs()[:, None, None]
        return Check(dx, expected, magnitude)

    yield from _convolutions(run, weight_format=WEIGHT_FORMATS, bias=(False, True, False))


@problem("conv2d", "weight_grad")
def _conv2d_weight_grad() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, conv: dict, format: str, weight_format: str) -> Check:
        weight_shape, y_shape, arguments = _conv_shapes(conv)
        x, dy = randn(*conv["x"], dtype=dtype, format=format), randn(*y_shape, dtype=dtype, format=format)
        dw = empty(*weight_shape, dtype=dtype, format=weight_format)
        C.conv2d_weight_grad(dw, dy, x, **arguments, threads=2, kernel=row)
        expected = torch.nn.grad.conv2d_weight(x.double(), weight_shape, dy.double(), **arguments)
        magnitude = torch.nn.grad.conv2d_weight(x.double().abs(), weight_shape, dy.double().abs(), **arguments)
        return Check(dw, expected, magnitude)

    yield from _convolutions(run, weight_format=("nchw", "nhwc", "nchw"))


@problem("conv2d", "bias_grad")
def _conv2d_bias_grad() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, shape: tuple[int, ...], format: str) -> Check:
        dy = randn(*shape, dtype=dtype, format=format)
        db = empty(shape[1], dtype=dtype)
        C.conv2d_bias_grad(db, dy, threads=2, kernel=row)
        return Check(db, dy.double().sum((0, 2, 3)), dy.double().abs().sum((0, 2, 3)))

    for format in FORMATS:
        for shape in ((2, 3, 9, 11), (1, 37, 20, 20), (3, 64, 1, 1)):
            yield partial(run, shape=shape, format=format)


@problem("peak", "fma")
def _peak_fma() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, threads: int, iterations: int) -> Check:
        x = torch.randint(-8, 9, (threads, 192)).to(dtype)
        y = empty(threads, 192, dtype=dtype)
        C.peak_fma(y, x, 0.5, 1.0, iterations, threads, kernel=row)
        expected = x.double()
        for _ in range(iterations):
            expected = expected * 0.5 + 1
        return Check(y, expected)

    for threads, iterations in ((1, 0), (1, 1), (2, 5), (3, 8)):
        yield partial(run, threads=threads, iterations=iterations)


# ---- Batch normalization ---------------------------------------------------------------------------------------------

BATCH_NORMS = (
    # Odd sizes, a plane of several pieces, one pixel, channels that fold into a row with pixels left over, many, planes
    # of three vectors and a pixel.
    dict(shape=(2, 3, 9, 11), act=None, residual=False, weight=True, affine=None),
    dict(shape=(3, 37, 8, 8), act="relu", residual=False, weight=True, affine=torch.float32),
    dict(shape=(2, 3, 95, 97), act="relu", residual=True, weight=False, affine=None),
    dict(shape=(7, 5, 1, 1), act="tanh", residual=True, weight=True, affine=None),
    dict(shape=(37, 1100, 1, 1), act="silu", residual=False, weight=True, affine=torch.float32),
    dict(shape=(5, 16, 6, 7), act="gelu", residual=True, weight=False, affine=None),
    dict(shape=(3, 20, 13, 5), act="softplus", residual=True, weight=True, affine=None),
    dict(shape=(3, 21, 7, 7), act="relu", residual=True, weight=True, affine=None),
    dict(shape=(2, 19, 6, 9), act="silu", residual=False, weight=True, affine=torch.float32),
)


def _batch_norm_inputs(dtype: torch.dtype, case: dict, format: str) -> dict:
    """Tensors as the kernels get them, and a leaf in float64 of each."""
    shape, channels = case["shape"], case["shape"][1]
    affine = case["affine"] if case["affine"] and dtype in (torch.bfloat16, torch.float16) else dtype
    scale, shift = torch.rand(channels).double() + 0.5, 3 * torch.randn(channels).double()
    x = randn(*shape, dtype=torch.float64) * scale[:, None, None] + shift[:, None, None]
    given = dict(x=x.to(dtype).contiguous(memory_format=FORMATS[format]))
    given["residual"] = randn(*shape, dtype=dtype, format=format) if case["residual"] else None
    given["weight"] = (torch.rand(channels) + 0.5).to(affine) if case["weight"] else None
    given["bias"] = torch.randn(channels).to(affine) if case["weight"] else None
    leaves = {k: None if v is None else v.double().requires_grad_() for k, v in given.items()}
    return dict(given=given, leaves=leaves)


def _batch_norm_oracle(leaves: dict, training: bool, mean: Tensor, var: Tensor, act: str | None) -> Tensor:
    from cnnops.ops import _activation

    # In float64, with sums by halves: torch's own batch_norm adds 1e4 terms one after the other, which shows.
    x = leaves["x"]
    if training:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    y = (x - mean.double()[:, None, None]) * (var.double() + 1e-3).rsqrt()[:, None, None]
    if leaves["weight"] is not None:
        y = y * leaves["weight"][:, None, None] + leaves["bias"][:, None, None]
    y = y if leaves["residual"] is None else y + leaves["residual"]
    return _activation.apply(y, _activation.INDEX[act])


def _batch_norm_forward(training: bool) -> Iterator[Callable]:
    from cnnops.ops import _activation

    def run(dtype: torch.dtype, row: int, case: dict, format: str) -> Check:
        inputs = _batch_norm_inputs(dtype, case, format)
        given, channels = inputs["given"], case["shape"][1]
        y = empty(*case["shape"], dtype=dtype, format=format)
        kind = torch.float64 if training else dtype
        mean, var = torch.randn(channels).to(kind), (torch.rand(channels) + 0.5).to(kind)
        C.batch_norm_forward(
            y, mean, var, given["x"], given["weight"], given["bias"], given["residual"], training, 1e-3,
            _activation.INDEX[case["act"]], threads=2, kernel=row,
        )  # fmt: skip
        x = given["x"].double()
        if training:
            exact = x.mean((0, 2, 3)), (x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
            Check(mean.to(compute(dtype)), exact[0], x.abs().mean((0, 2, 3))).verify()
            Check(var.to(compute(dtype)), exact[1], 4 * exact[1]).verify()
        expected = _batch_norm_oracle(inputs["leaves"], training, mean, var, case["act"]).detach()
        # The terms of z: (x - mean) * invstd * weight, whose factors each come with a few roundings, bias, residual.
        m, v = (exact[0], exact[1]) if training else (mean.double(), var.double())
        # The mean is exact beside float32; in float64 it has an error of its own.
        mean_size = m.abs() * (1 if dtype == torch.float64 else torch.finfo(torch.float32).eps)
        magnitude = (x - m[:, None, None]).abs() + mean_size[:, None, None]
        magnitude = (
            magnitude
            * ((v + 1e-3).rsqrt() * (1 if given["weight"] is None else given["weight"].double()))[:, None, None]
        )
        for name in ("bias", "residual"):
            if given[name] is not None:
                term = given[name].double().abs()
                magnitude = magnitude + (term[:, None, None] if name == "bias" else term)
        return Check(y, expected, 4 * magnitude + 1)

    for format in FORMATS:
        for case in BATCH_NORMS:
            yield partial(run, case=case, format=format)


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


problem("batch_norm", "training")(lambda: _batch_norm_forward(True))
problem("batch_norm", "evaluation")(lambda: _batch_norm_forward(False))


@problem("batch_norm", "backward")
def _batch_norm_backward() -> Iterator[Callable]:
    from cnnops.ops import _activation

    def run(
        dtype: torch.dtype, row: int, case: dict, format: str, training: bool, saved_y: bool, wants: tuple[bool, ...]
    ) -> Check:
        inputs = _batch_norm_inputs(dtype, case, format)
        given, leaves, shape = inputs["given"], inputs["leaves"], case["shape"]
        channels, act = shape[1], _activation.INDEX[case["act"]]
        x, dy = given["x"].double(), randn(*shape, dtype=dtype, format=format)
        if training:
            mean, var = x.mean((0, 2, 3)), (x - x.mean((0, 2, 3), keepdim=True)).square().mean((0, 2, 3))
        else:
            mean, var = torch.randn(channels).to(dtype), (torch.rand(channels) + 0.5).to(dtype)
        y = _batch_norm_oracle(leaves, training, mean, var, case["act"])
        # A result so near to relu's corner may be rounded to either side of it.
        dy[_batch_norm_oracle(leaves, training, mean, var, None).detach().abs() < 1e-5] = 0
        affine = given["weight"].dtype if case["weight"] else dtype
        got = {
            "x": empty(*shape, dtype=dtype, format=format),
            "weight": empty(channels, dtype=affine) if case["weight"] else None,
            "bias": empty(channels, dtype=affine) if case["weight"] else None,
            "residual": empty(*shape, dtype=dtype, format=format) if case["residual"] else None,
        }
        got = {k: v if want else None for (k, v), want in zip(got.items(), wants, strict=True)}
        result = None
        if saved_y and act in _activation.OUTPUT_IS_ENOUGH:
            # What forward stored; the oracle's derivative is taken there, too.
            result = y.detach().to(dtype).contiguous(memory_format=FORMATS[format])
        C.batch_norm_backward(
            got["x"], got["weight"], got["bias"], got["residual"], dy, given["x"], result, given["residual"], mean, var,
            given["weight"], given["bias"], training, 1e-3, act, threads=2, kernel=row,
        )  # fmt: skip
        z = _batch_norm_oracle(leaves, training, mean, var, None).detach().requires_grad_()
        if result is None:
            (slope,) = torch.autograd.grad(_activation.apply(z, act).sum(), z)
        else:
            from cnnops.ops.batch_norm import _derivative_of_output

            slope = _derivative_of_output(result.double(), act) if act else torch.ones_like(z)
        dz = dy.double() * slope
        plain = _batch_norm_oracle(leaves, training, mean, var, None)
        names = [k for k, v in got.items() if v is not None]
        expected = dict(zip(names, torch.autograd.grad(plain, [leaves[k] for k in names], dz), strict=True))
        # Magnitudes of the terms; an activation's derivative has an absolute error of a few roundings of its own.
        size = dy.double().abs() * (slope.abs() + 1)
        invstd = (var.double() + 1e-3).rsqrt()[:, None, None]
        deviation = (x - mean.double()[:, None, None]).abs() * invstd
        if dtype == torch.float64:  # where the mean has an error of its own
            deviation = deviation + mean.abs()[:, None, None] * invstd
        sums = {"bias": size.sum((0, 2, 3)), "weight": (size * deviation).sum((0, 2, 3))}
        count = x.numel() / channels
        through = (sums["bias"][:, None, None] + deviation * sums["weight"][:, None, None]) / count if training else 0
        factor = 1 if given["weight"] is None else given["weight"].double()[:, None, None]
        magnitude = {**sums, "residual": size, "x": 4 * factor * invstd * (size + through)}
        for name in names[1:]:
            Check(got[name], expected[name], 4 * magnitude[name]).verify()
        storage = torch.finfo(dtype).eps / torch.finfo(compute(dtype)).eps if got["residual"] is not None else 1
        # dz is stored in the dtype in between where dresidual is asked for.
        return Check(got[names[0]], expected[names[0]], magnitude[names[0]] * max(1, storage / 4))

    for format in FORMATS:
        for i, case in enumerate(BATCH_NORMS):
            for training in (True, False):
                yield partial(
                    run, case=case, format=format, training=training, saved_y=case["residual"] and i % 2 == 0,
                    wants=(True, True, True, i != 2),
                )  # fmt: skip
    for wants in ((False, True, False, True), (True, False, False, False)):
        yield partial(run, case=BATCH_NORMS[6], format="nhwc", training=True, saved_y=False, wants=wants)


@problem("batch_norm", "update")
def _batch_norm_update() -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, channels: int, step: int) -> Check:
        running = [torch.rand(channels * step).to(dtype)[::step] for _ in range(2)]
        mean, var = torch.randn(channels).double(), torch.rand(channels).double()
        expected = torch.stack([0.7 * running[0].double() + 0.3 * mean, 0.7 * running[1].double() + 0.3 * var * 10 / 9])
        C.batch_norm_update(*running, mean, var, 0.3, 10, kernel=row)
        return Check(torch.stack(running), expected, torch.full_like(expected, 2))

    for channels, step in ((1, 1), (37, 1), (300, 2)):
        yield partial(run, channels=channels, step=step)


# ---- Locally connected layer -----------------------------------------------------------------------------------------

LOCALLY_CONNECTED = (
    # padding: top, bottom, left, right
    dict(x=(2, 3, 9, 11), k=5, rs=(3, 3), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1)),
    dict(x=(19, 4, 7, 6), k=6, rs=(3, 2), stride=(2, 1), padding=(1, 1, 0, 1), dilation=(1, 2)),
    dict(x=(1, 7, 12, 12), k=3, rs=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1)),
    dict(x=(5, 17, 4, 5), k=37, rs=(2, 3), stride=(1, 2), padding=(2, 2, 4, 4), dilation=(2, 2)),
    dict(x=(9, 5, 6, 7), k=37, rs=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1)),
    dict(x=(8, 18, 9, 10), k=19, rs=(2, 2), stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1)),
)


def locally_connected2d_oracle(x: Tensor, weight: Tensor, conv: dict) -> Tensor:
    """One convolution per output position, each with its own filters."""
    top, bottom, left, right = conv["padding"]
    padded = F.pad(x, (left, right, top, bottom))
    p, q, *_, r, s = weight.shape
    reach = [d * (taps - 1) + 1 for d, taps in zip(conv["dilation"], (r, s), strict=True)]
    rows = []
    for i in range(p):
        row = []
        for j in range(q):
            h, w = i * conv["stride"][0], j * conv["stride"][1]
            patch = padded[:, :, h : h + reach[0], w : w + reach[1]]
            row.append(F.conv2d(patch, weight[i, j], dilation=conv["dilation"]))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def _locally_connected(wanted: str) -> Iterator[Callable]:
    def run(dtype: torch.dtype, row: int, conv: dict, format: str, bias: int) -> Check:
        n, c, h, w = conv["x"]
        top, bottom, left, right = conv["padding"]
        p, q = (
            (size + pad - d * (taps - 1) - 1) // step + 1
            for size, pad, d, taps, step in zip(
                (h, w), (top + bottom, left + right), conv["dilation"], conv["rs"], conv["stride"], strict=True
            )
        )
        k = conv["k"]
        x, weight = randn(*conv["x"], dtype=dtype, format=format), randn(p, q, k, c, *conv["rs"], dtype=dtype)
        dy = randn(n, k, p, q, dtype=dtype, format=format)
        arguments = dict(stride=conv["stride"], padding=(top, left), dilation=conv["dilation"], threads=2, kernel=row)

        def oracle(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
            x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
            y = locally_connected2d_oracle(x, weight, conv)
            if wanted == "forward":
                return y.detach()
            return torch.autograd.grad(y, x if wanted == "input_grad" else weight, dy.double())[0]

        expected, magnitude = oracle(x, weight, dy), oracle(x.abs(), weight.abs(), dy.abs())
        if wanted == "forward":
            b = (None, randn(k, dtype=dtype), randn(k, p, q, dtype=dtype))[bias]
            got = empty(n, k, p, q, dtype=dtype, format=format)
            C.locally_connected2d_forward(got, x, weight, b, **arguments)
            if b is not None:
                b = b.double() if b.dim() == 3 else b.double()[:, None, None]
                expected, magnitude = expected + b, magnitude + b.abs()
        elif wanted == "input_grad":
            got = empty(*conv["x"], dtype=dtype, format=format)
            C.locally_connected2d_input_grad(got, dy, weight, **arguments)
        else:
            got = empty(*weight.shape, dtype=dtype)
            C.locally_connected2d_weight_grad(got, dy, x, **arguments)
        return Check(got, expected, magnitude)

    for format in FORMATS:
        for i, conv in enumerate(LOCALLY_CONNECTED):
            yield partial(run, conv=conv, format=format, bias=i % 3)


for _pass in ("forward", "input_grad", "weight_grad"):
    problem("locally_connected2d", _pass)(partial(_locally_connected, _pass))
