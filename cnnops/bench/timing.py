"""Times calls in turn, and measures what the machine can do at most."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._lib import C

MIN_SAMPLE = 1e-3  # seconds; shorter calls are timed several at once
MAX_ROUNDS = 1000


@dataclass
class Times:
    """Seconds per call. ``spread`` is the distance between the quartiles over the median."""

    median: float
    spread: float
    best: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> Times:
        median = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
        return Times(median, (high - low) / median, min(samples), len(samples))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_turn(
    first: Callable[[], Any], second: Callable[[], Any], warmup: int, repeats: int, min_time: float,
    finish: Callable[[], Any] = lambda: None,
) -> tuple[Times, Times, float]:  # fmt: skip
    """Times of both, and how often faster the first is: the median over the rounds of second / first, which noise that
    slows a whole round does not move. Each round times both, in alternating order, until there are ``repeats`` rounds
    and ``min_time`` seconds have passed. Data stays where the caches keep it from call to call. ``finish``
    waits for what a call left to be done.
    """
    calls = (first, second)
    loops = []
    for call in calls:
        for _ in range(warmup):
            call()
        finish()
        start = time.perf_counter()
        call()
        finish()
        loops.append(max(1, math.ceil(MIN_SAMPLE / max(time.perf_counter() - start, 1e-7))))
    samples: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        while len(samples[0]) < repeats or time.perf_counter() - began < min_time:
            for i in (0, 1) if len(samples[0]) % 2 == 0 else (1, 0):
                call, count = calls[i], loops[i]
                start = time.perf_counter()
                for _ in range(count):
                    call()
                finish()
                samples[i].append((time.perf_counter() - start) / count)
            if len(samples[0]) >= MAX_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    ratio = statistics.median(b / a for a, b in zip(*samples, strict=True))
    return Times.of(samples[0]), Times.of(samples[1]), ratio


def _best(call: Callable[[], Any], at_least: float = 0.5) -> float:
    """The shortest time of a call among those of this many seconds: a just started process may need a tenth of a second
    until its threads run on cores of their own."""
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < at_least:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def fma_peak(dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations per second of fused multiply-adds alone, at the instruction-set level in use, in the
    arithmetic of this dtype (float32 for the 16-bit ones)."""
    x = torch.rand(threads, 192, dtype=torch.float64).to(dtype)
    y = torch.empty_like(x)
    iterations = 200_000
    return 2 * threads * 192 * iterations / _best(lambda: C.peak_fma(y, x, 0.5, 1.0, iterations, threads))


def copy_bandwidth(size: int = 1 << 27, device: str = "cpu") -> float:
    """Bytes read and written per second by ``torch.Tensor.copy_`` from one buffer of ``size`` bytes to another."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    if device == "cpu":
        return 2 * size / _best(lambda: target.copy_(source))

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()

    return 20 * size / _best(copies)


def matrix_peak(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations per second of PyTorch's matrix product on the current CUDA device, on random data."""
    size = 2048 if dtype == torch.float64 else size
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))

    def products() -> None:
        for _ in range(4):
            a @ b
        torch.cuda.synchronize()

    return 8 * size**3 / _best(products)
