"""Small models of plain torch.nn, with the layers and habits of real ones; at the top level of a file, to be pickled.

No convolution before a batch normalization has a bias: its gradient is zero but for rounding, and compares to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block, as of resnet18."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or c != k:
            self.shortcut = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """[N, 3, 24, 24] to [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 12, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Depthwise(nn.Module):
    """[N, 3, 24, 24] to [N, 5], as mobilenet_v2: expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 24, 1, bias=False),
            nn.BatchNorm2d(24, momentum=None),
            nn.Hardswish(),
            nn.Conv2d(24, 24, 5, 2, 2, groups=24, bias=False),
            nn.BatchNorm2d(24, affine=False),
            nn.SiLU(),
            nn.Conv2d(24, 12, 1, groups=2),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        )
        self.pool = nn.AdaptiveMaxPool2d((2, 1))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class UNet(nn.Module):
    """[N, 3, 24, 24] to [N, 2, 24, 24]: skips, transposed convolution, dilation, reflected and circular borders."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.down2 = nn.Conv2d(6, 10, 3, padding="same", dilation=2, padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm2d(10, track_running_stats=False)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.up = nn.ConvTranspose2d(10, 6, 3, stride=2, padding=1)
        self.out = nn.Conv2d(12, 2, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        a = F.gelu(self.down1(x))
        b = F.elu(self.norm(self.down2(self.pool(a))))
        up = self.up(b, output_size=a.shape[-2:])
        return self.out(torch.cat([a, up], 1))


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet": ResNet, "depthwise": Depthwise, "unet": UNet}


def images(
    n: int = 3, dtype: torch.dtype = torch.float32, format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    return torch.randn(n, 3, 24, 24, dtype=torch.float64).to(dtype).contiguous(memory_format=format)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A training step's output, gradient of the input, gradients of the parameters, and the buffers afterwards."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, grads, {name: b.clone() for name, b in model.named_buffers()}


def near(got: object, expected: object, tolerance: float | None = None) -> None:
    """Equal up to rounding, by each tensor's largest magnitude: 1e-10 in float64, 300 roundings in narrower types."""
    if isinstance(expected, dict):
        assert isinstance(got, dict)
        assert got.keys() == expected.keys()
        for key in expected:
            try:
                near(got[key], expected[key], tolerance)
            except AssertionError as error:
                raise AssertionError(f"{key}: {error}") from error
        return
    if isinstance(expected, (tuple, list)):
        assert isinstance(got, (tuple, list))
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            near(g, e, tolerance)
        return
    assert isinstance(expected, Tensor)
    assert isinstance(got, Tensor)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if not expected.dtype.is_floating_point:
        assert torch.equal(got, expected)
        return
    if tolerance is None:
        tolerance = 1e-10 if expected.dtype == torch.float64 else 300 * torch.finfo(expected.dtype).eps
    if expected.numel():
        got, expected = got.detach().double(), expected.detach().double()
        assert torch.equal(got.isnan(), expected.isnan()), "NaNs differ"
        error = float((got - expected).nan_to_num().abs().max())
        scale = float(expected.nan_to_num().abs().max())
        assert error <= tolerance * max(scale, 1e-3), f"error {error:.3g} at magnitude {scale:.3g}"
