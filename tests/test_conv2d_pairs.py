"""Convolution by products of pairs of bfloat16 numbers: any number of threads, float32 as sums of bfloat16 parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnops._lib import C
from cnnops.ops.conv2d import precision

FORMATS = (torch.contiguous_format, torch.channels_last)
PASSES = ("forward", "input_grad", "weight_grad")
IEEE, TF32, BF16 = 0, 1, 2


def rows(dtype: str) -> list[dict]:
    return [r for r in C.kernels() if r["function"].startswith("conv2d_pairs") and r["dtype"] == dtype and r["usable"]]


def identify(row: dict) -> str:
    return f"{row['isa']}-{row['function']}"


def tensors(
    format: torch.memory_format, dtype: torch.dtype, n: int = 9, c: int = 24, k: int = 40, size: int = 11, r: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((n, c, size, size), (k, c, r, r), (n, k, size, size))
    x, w, dy = (torch.randn(s).to(dtype).contiguous(memory_format=format) for s in shapes)
    return x, w, dy


def run(row: dict, x: Tensor, w: Tensor, dy: Tensor, threads: int = 2, precision: int = IEEE) -> Tensor:
    pad = w.shape[2] // 2
    arguments = dict(
        stride=(1, 1), padding=(pad, pad), dilation=(1, 1), groups=1, threads=threads, precision=precision,
        kernel=row["row"],
    )  # fmt: skip
    if row["pass"] == "forward":
        out = torch.empty_like(dy)
        C.conv2d_forward(out, x, w, None, None, activation=0, **arguments)
    elif row["pass"] == "input_grad":
        out = torch.empty_like(x)
        C.conv2d_input_grad(out, dy, w, None, **arguments)
    else:
        out = torch.empty_like(w)
        C.conv2d_weight_grad(out, dy, x, **arguments)
    return out


def torch_result(name: str, x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    pad = w.shape[2] // 2
    if name == "forward":
        return F.conv2d(x, w, None, 1, pad)
    mask = [name == "input_grad", name == "weight_grad", False]
    grads = torch.ops.aten.convolution_backward(dy, x, w, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, mask)
    return grads[0 if mask[0] else 1]


def rms(t: Tensor, expected: Tensor) -> float:
    return float((t.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", rows("bfloat16") + rows("float32"), ids=identify)
def test_any_number_of_threads_gives_the_same_bits(row: dict, format: torch.memory_format) -> None:
    torch.manual_seed(1)
    for r, size in ((3, 11), (1, 14)):
        x, w, dy = tensors(format, getattr(torch, row["dtype"]), size=size, r=r)
        one = run(row, x, w, dy, threads=1)
        for threads in (2, 3, 7):
            assert torch.equal(run(row, x, w, dy, threads=threads), one)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", rows("float32"), ids=identify)
def test_float32_is_as_exact_as_the_setting_asks(row: dict, format: torch.memory_format) -> None:
    torch.manual_seed(2)
    x, w, dy = tensors(format, torch.float32, n=3, c=70, k=48, size=14)
    expected = torch_result(row["pass"], x.double(), w.double(), dy.double())
    theirs = rms(torch_result(row["pass"], x, w, dy), expected)
    assert rms(run(row, x, w, dy, precision=IEEE), expected) <= theirs
    assert 1e-6 < rms(run(row, x, w, dy, precision=TF32), expected) < 2e-5
    assert 5e-4 < rms(run(row, x, w, dy, precision=BF16), expected) < 5e-3


def with_one(value: float) -> tuple[Tensor, Tensor, Tensor]:
    x, w, dy = tensors(torch.contiguous_format, torch.float32, n=2, c=16, k=16, size=9)
    x[1, 3, 4, 5] = value
    dy[0, 2, 3, 4] = value
    return x, w, dy


@pytest.mark.parametrize("precision", [IEEE, TF32, BF16])
@pytest.mark.parametrize("row", rows("float32"), ids=identify)
def test_what_cannot_be_split_is_computed_without_splitting(row: dict, precision: int) -> None:
    torch.manual_seed(3)
    tiny = tensors(torch.contiguous_format, torch.float32, n=2, c=16, k=16, size=9)
    data = {
        "inf": with_one(float("inf")), "nan": with_one(float("nan")), "rounds to inf": with_one(3.4e38),
        "tiny": tuple(t * 1e-19 for t in tiny),
    }  # fmt: skip
    direct = next(r for r in C.kernels() if r["function"] == f"conv2d_{row['pass']}_f32" and r["isa"] == "baseline")
    for name, (x, w, dy) in data.items():
        out, expected = run(row, x, w, dy, precision=precision), run(direct, x, w, dy)
        assert torch.equal(out.isnan(), expected.isnan()), name
        # But for the roundings of the direct kernel, which is another level's where there is AMX.
        scale = 1e-38 if name == "tiny" else 1.0
        torch.testing.assert_close(out / scale, expected / scale, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_zeros_are_split() -> None:
    for row in rows("float32"):
        x, w, dy = (torch.zeros_like(t) for t in tensors(torch.contiguous_format, torch.float32))
        assert not run(row, x, w, dy).any()


def test_precision_follows_the_setting_of_torch() -> None:
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        for name, value in (("ieee", IEEE), ("tf32", TF32), ("bf16", BF16), ("none", IEEE)):
            torch.backends.mkldnn.conv.fp32_precision = name
            assert precision() == value
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


def test_an_unknown_precision_is_refused() -> None:
    x, w, dy = tensors(torch.contiguous_format, torch.float32)
    for row in rows("float32")[:1]:
        with pytest.raises(ValueError, match="precision 3"):
            run(row, x, w, dy, precision=3)
