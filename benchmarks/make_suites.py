"""Writes cnnops/bench/suites/*.txt from torchvision's models (and a U-Net), by forward hooks on meta tensors.

Run it as ``python benchmarks/make_suites.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_cpu import torchvision

from cnnops.bench.suites import SUITES, parse_line

OUT = Path(__file__).resolve().parent.parent / "cnnops" / "bench" / "suites"
HEADER = """\
# {title}
# One line per distinct layer, `count` how often it occurs. C H W: input channels, height, width; K: output channels;
# R S: filter; a pair is height,width. Written by benchmarks/make_suites.py.
"""


class UNet(nn.Module):
    """The encoder and decoder of Ronneberger et al., "U-Net" (2015), with padded convolutions and batch norm."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 1024), classes: int = 2) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(self.block(c, k) for c, k in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        up = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, k, 2, stride=2) for c, k in up)
        self.decoder = nn.ModuleList(self.block(c, k) for c, k in up)
        self.head = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def block(c: int, k: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (c, k):
            layers += [nn.Conv2d(channels, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        for up, block, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = block(torch.cat((skip, up(x)), 1))
        return self.head(x)


def pair(value: Any) -> str:
    first, second = (value, value) if isinstance(value, int) else value
    return f"{first},{second}"


def describe(module: nn.Module, x: Tensor, y: Tensor) -> str | None:
    image = "C={} H={} W={}".format(*x.shape[1:]) if x.dim() == 4 else ""
    match module:
        case nn.Conv2d() | nn.ConvTranspose2d():
            assert module.padding_mode == "zeros"
            op = "conv2d" if isinstance(module, nn.Conv2d) else "conv_transpose2d"
            more = f"output_pad={pair(module.output_padding)} " if op == "conv_transpose2d" else ""
            return (
                f"{op} {image} K={module.out_channels} R={module.kernel_size[0]} S={module.kernel_size[1]} "
                f"stride={pair(module.stride)} pad={pair(module.padding)} {more}dilation={pair(module.dilation)} "
                f"groups={module.groups} bias={int(module.bias is not None)}"
            )
        case nn.MaxPool2d():
            return (
                f"max_pool2d {image} kernel={pair(module.kernel_size)} stride={pair(module.stride)} "
                f"pad={pair(module.padding)} dilation={pair(module.dilation)} ceil={int(module.ceil_mode)}"
            )
        case nn.AvgPool2d():
            return (
                f"avg_pool2d {image} kernel={pair(module.kernel_size)} stride={pair(module.stride)} "
                f"pad={pair(module.padding)} ceil={int(module.ceil_mode)}"
            )
        case nn.AdaptiveAvgPool2d():
            return f"adaptive_avg_pool2d {image} P={y.shape[2]} Q={y.shape[3]}"
        case nn.BatchNorm2d():
            return f"batch_norm {image}"
    return None


def layers(model: nn.Module, size: int) -> Counter[str]:
    found: Counter[str] = Counter()

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        text = describe(module, args[0], y)
        if text is not None:
            layer = parse_line(text)
            assert layer.output == tuple(y.shape[2:]), (text, layer.output, y.shape)
            found[layer.text] += 1

    # Some models call this one as a function, where no hook sees it; the module calls the function too.
    adaptive_avg_pool2d = nn.functional.adaptive_avg_pool2d

    def seen_adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
        y = adaptive_avg_pool2d(input, output_size)
        hook(nn.AdaptiveAvgPool2d(output_size), (input,), y)
        return y

    for module in model.modules():
        if not isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(hook)
    nn.functional.adaptive_avg_pool2d = seen_adaptive_avg_pool2d
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
    finally:
        nn.functional.adaptive_avg_pool2d = adaptive_avg_pool2d
    return found


def main() -> None:
    for name in SUITES:
        size = 256 if name == "unet" else 224
        with torch.device("meta"):
            model = UNet() if name == "unet" else getattr(torchvision.models, name)()
        title = f"U-Net, input 3x{size}x{size}" if name == "unet" else f"torchvision's {name}, input 3x{size}x{size}"
        order = {op: i for i, op in enumerate(("conv2d", "conv_transpose2d", "batch_norm"))}
        found = layers(model, size)
        lines = sorted(found, key=lambda line: order.get(line.split()[0], len(order)))  # else in the network's order
        body = "".join(f"{line} count={found[line]}\n" for line in lines)
        (OUT / f"{name}.txt").write_text(HEADER.format(title=title) + body, encoding="utf-8")
        print(f"{name}: {len(lines)} distinct layers, {sum(found.values())} in all")


if __name__ == "__main__":
    main()
