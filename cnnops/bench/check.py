"""Holds results against float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Part:
    """A part of a result, the float64 truth, the sum of the magnitudes of each element's terms, and their number."""

    name: str
    got: Tensor
    expected: Tensor
    magnitude: Tensor
    terms: int


@dataclass
class Verdict:
    """``wrong`` is empty where every element is within its bound; ``rms`` is the root mean square error relative to the
    truth's root mean square, ``worst`` the largest error in units of eps x sum of magnitudes (eps of the arithmetic, or
    of the storage where that is coarser), both of the first part."""

    wrong: str
    rms: float
    worst: float


def verify(parts: Iterable[Part], float32_eps: float = torch.finfo(torch.float32).eps) -> Verdict:
    """Whether every element is within its bound: (4 + sqrt(terms)) x eps x sum of its terms' magnitudes, for the
    arithmetic in float32 (or float64), and one rounding to the storage type. sqrt(terms) and not terms: roundings do
    not conspire (Higham, Mary: "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41,
    2019), and a bound this close sees a single term left out of up to forty thousand. ``float32_eps`` is for arithmetic
    that PyTorch's settings let be coarser for float32 tensors (TF32: 2^-10).
    """
    verdict = None
    for part in parts:
        got, expected = part.got.detach().double(), part.expected.detach()
        if got.shape != expected.shape:
            return Verdict(
                f"{part.name}: shape {list(got.shape)} instead of {list(expected.shape)}", math.nan, math.nan
            )
        storage = torch.finfo(part.got.dtype)
        arithmetic = torch.finfo(torch.float64 if part.got.dtype == torch.float64 else torch.float32)
        magnitude = part.magnitude.detach()
        error = (got - expected).abs()
        eps = float32_eps if part.got.dtype == torch.float32 else arithmetic.eps
        bound = (4 + math.sqrt(part.terms)) * eps * magnitude + storage.eps * expected.abs()
        bad = ~(error <= bound + storage.smallest_normal)
        if verdict is None:
            scale = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
            unit = max(arithmetic.eps, storage.eps)
            worst = (error / (unit * magnitude + storage.smallest_normal)).max()
            verdict = Verdict("", float(error.square().mean().sqrt() / scale), float(worst))
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            verdict.wrong = (
                f"{part.name}: {int(bad.sum())} of {bad.numel()} checked elements are wrong, for one "
                f"{float(got[at]):.9g} instead of {float(expected[at]):.9g} (allowed error {float(bound[at]):.2g})"
            )
            return verdict
    assert verdict is not None
    return verdict
