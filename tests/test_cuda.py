"""The functions and modules on a CUDA device: against float64 on the CPU, and beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cnnops
import cnnops.functional as CF
from cnnops._lib import C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        C.cuda_build() is None or not torch.cuda.is_available(), reason="needs a CUDA build and a CUDA device"
    ),
]
DEVICE = "cuda"
FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Make = Callable[..., Tensor]

# name -> (function of the inputs, their shapes, their number of terms per result)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], int]] = {
    "conv2d": (lambda x, w, b: CF.conv2d(x, w, b, padding=1), ((2, 16, 15, 13), (24, 16, 3, 3), (24,)), 144),
    "conv2d strided": (lambda x, w: CF.conv2d(x, w, None, 2, (1, 0), 2), ((3, 3, 21, 20), (70, 3, 5, 3)), 45),
    "conv2d groups": (lambda x, w: CF.conv2d(x, w, groups=2), ((2, 32, 9, 9), (48, 16, 3, 3)), 144),
    "conv2d depthwise": (lambda x, w: CF.conv2d(x, w, groups=24, padding=3), ((2, 24, 17, 16), (24, 1, 7, 7)), 49),
    "conv_transpose2d": (
        lambda x, w, b: CF.conv_transpose2d(x, w, b, 2, 1, 1), ((2, 16, 7, 6), (16, 8, 3, 3), (8,)), 144
    ),
    "max_pool2d": (lambda x: CF.max_pool2d(x, 3, 2, 1), ((2, 16, 17, 19),), 1),
    "avg_pool2d": (lambda x: CF.avg_pool2d(x, 3, 2, 1, True), ((2, 16, 17, 19),), 9),
    "median_pool2d": (lambda x: CF.median_pool2d(x, 3, 1, 1), ((2, 8, 12, 11),), 1),
    "adaptive_avg_pool2d": (lambda x: CF.adaptive_avg_pool2d(x, 1), ((2, 16, 30, 31),), 930),
    "adaptive_max_pool2d": (lambda x: CF.adaptive_max_pool2d(x, (3, 5)), ((2, 16, 17, 19),), 1),
    "batch_norm": (
        lambda x, w, b: CF.batch_norm(x, None, None, w, b, True, activation="relu"), ((4, 16, 9, 8), (16,), (16,)), 300
    ),
    "locally_connected2d": (
        lambda x, w, b: CF.locally_connected2d(x, w, b), ((3, 4, 6, 7), (4, 5, 8, 4, 3, 3), (8,)), 36
    ),
}  # fmt: skip


def inputs_of(case: str, dtype: torch.dtype, format: torch.memory_format) -> list[Tensor]:
    return [
        torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=format)
        if len(shape) == 4
        else torch.randn(shape, dtype=torch.float64).to(dtype)
        for shape in CASES[case][1]
    ]


@pytest.fixture(autouse=True)
def float32_as_float32() -> object:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("format", FORMATS, ids=("nchw", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_float64(case: str, dtype: torch.dtype, format: torch.memory_format) -> None:
    function, _, terms = CASES[case]
    given = inputs_of(case, dtype, format)
    there = [t.to(DEVICE).requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    y, expected = function(*there), function(*exact)
    assert y.device.type == DEVICE
    assert y.dtype == dtype
    dy = torch.randn_like(expected).to(dtype)
    got = [y, *torch.autograd.grad(y, there, dy.to(DEVICE).contiguous(memory_format=format))]
    want = [expected, *torch.autograd.grad(expected, exact, dy.double())]
    # Of batch norm's and of convolutions' gradients there are more terms, of about unit size.
    eps = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        bound = (4 + terms**0.5) * eps * (b.abs() + b.square().mean().sqrt() + 1) * (8 if case == "batch_norm" else 4)
        assert ((a.cpu().double() - b).abs() <= bound).all(), case


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("adaptive_max_pool2d",)])
def test_second_derivatives(case: str) -> None:
    function, shapes, _ = CASES[case]
    small = [tuple(min(s, 6) if i > 1 and len(shape) == 4 else s for i, s in enumerate(shape)) for shape in shapes]
    if case != "conv2d":
        small = list(shapes)
    leaves = [torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in small]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_an_own_stream_is_used() -> None:
    """Nothing waits in between: a kernel on another stream would come too early or too late."""
    x = torch.randn(8, 64, 128, 128, device=DEVICE)
    expected = F.avg_pool2d(x, 3, 1, 1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            z = x.clone()
            for _ in range(10):
                z = z * 1
            y = CF.avg_pool2d(z, 3, 1, 1).clone()
            z.zero_()
        stream.synchronize()
        torch.testing.assert_close(y, expected)


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.nn.Conv2d(16, 32, 1), torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10),
    )  # fmt: skip


def test_a_training_step_is_captured_and_replayed() -> None:
    net = model().to(DEVICE)
    cnnops.convert_(net)
    plain = model().to(DEVICE)
    plain.load_state_dict(net.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, plain)]
    x = torch.randn(8, 3, 16, 16, device=DEVICE)
    target = torch.randint(10, (8,), device=DEVICE)

    def step(m: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(m(x), target)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(net, optimizers[0])
    for _ in range(5):
        graph.replay()
    for _ in range(8):  # capturing runs nothing
        expected = step(plain, optimizers[1])
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_autocast_casts_as_pytorch_does() -> None:
    x, w = torch.randn(2, 16, 9, 9, device=DEVICE), torch.randn(8, 16, 3, 3, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert CF.conv2d(x, w).dtype == F.conv2d(x, w).dtype == torch.bfloat16
        assert torch.ops.cnnops.conv2d(x, w, None, None, [1, 1], [0] * 4, [1, 1], 1, 0).dtype == torch.bfloat16
        assert CF.max_pool2d(x, 2).dtype == torch.float32


def test_running_statistics_follow_pytorch() -> None:
    ours, theirs = (torch.nn.BatchNorm2d(7).to(DEVICE) for _ in range(2))
    cnnops.convert_(ours)
    x = torch.randn(5, 7, 4, 3, device=DEVICE) + 3
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_precision_follows_pytorchs_setting() -> None:
    x, w = torch.randn(2, 64, 9, 9, device=DEVICE), torch.randn(64, 64, 3, 3, device=DEVICE)
    exact = F.conv2d(x.double(), w.double())

    def error() -> float:
        return float((CF.conv2d(x, w).double() - exact).norm() / exact.norm())

    accurate = error()
    torch.backends.cudnn.allow_tf32 = True
    assert accurate < 1e-6 < error() < 1e-3


def test_results_have_the_same_bits_each_time() -> None:
    x, w = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((8, 32, 33, 31), (48, 32, 3, 3)))
    first = None
    for _ in range(5):
        y = CF.conv2d(x, w, padding=1)
        found = [y, *torch.autograd.grad(CF.max_pool2d(y, 3, 2).square().sum(), (x, w))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_tensors_on_different_devices_are_refused() -> None:
    x, w = torch.randn(1, 8, 5, 5, device=DEVICE), torch.randn(8, 8, 3, 3)
    with pytest.raises(RuntimeError, match="weight"):
        CF.conv2d(x, w)
    with pytest.raises(RuntimeError):
        CF.batch_norm(x, None, None, torch.ones(8), torch.ones(8), True)


def test_compiled() -> None:
    net = model().to(DEVICE).eval()
    cnnops.convert_(net)
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


def test_patched() -> None:
    x, w = torch.randn(2, 8, 9, 9, device=DEVICE), torch.randn(8, 8, 3, 3, device=DEVICE)
    with cnnops.patch_aten():
        y = F.max_pool2d(F.conv2d(x, w), 2)
    torch.testing.assert_close(y, F.max_pool2d(F.conv2d(x, w), 2))


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 1, 1)])
def test_empty_batches_and_single_pixels(shape: tuple[int, ...]) -> None:
    x, w = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (shape, (4, 8, 1, 1)))
    y = CF.conv2d(x, w)
    torch.testing.assert_close(y, F.conv2d(x, w))
    got, expected = (torch.autograd.grad(out.sum(), (x, w)) for out in (y, F.conv2d(x, w)))
    torch.testing.assert_close(got, expected)


def test_strided_inputs() -> None:
    x = torch.randn(2, 9, 20, 16, device=DEVICE)[:, :8, ::2].transpose(2, 3)
    torch.testing.assert_close(CF.max_pool2d(x, 2), F.max_pool2d(x, 2))
    torch.testing.assert_close(CF.avg_pool2d(x, 2), F.avg_pool2d(x, 2))
