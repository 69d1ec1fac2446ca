"""From a layer to calls: tensors, cnnops' call and PyTorch's, work and bytes, and the float64 truth to hold results to.

A layer has the passes forward, backward-input and backward-weight where it is a convolution, else forward and backward.
Convolution gradients are the raw operators on both sides; the other gradients are taken by ``torch.autograd.grad`` on a
retained graph on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .check import Part
from .suites import Layer

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA = {
    "normal": "normal, mean 0, deviation 1",
    "offset": "normal, mean 100, deviation 1",
    "positive": "magnitudes of normal numbers, weights and gradients too",
    "wide": "magnitudes from 1e-30 to 1e30, evenly in the logarithm (float16: 1e-3 to 1e3, batch norm: 1e-15 to 1e15)",
}
# About what the float64 reference of a convolution does at most; what it leaves out is drawn by chance.
REFERENCE_MACS = 2e8
REFERENCE_ELEMENTS = 1 << 22


@dataclass
class Case:
    """One entry of the benchmark, ready to run (under ``torch.no_grad``: what is differentiated is a retained graph).
    ``parts`` takes what ``ours`` or ``theirs`` returned."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    parts: Callable[[Any], Iterator[Part]]
    bytes: int
    flops: int | None = None


def passes(layer: Layer) -> tuple[str, ...]:
    """The passes of a layer."""
    if layer.op == "conv2d" and (layer.word("activation") != "none" or layer["residual"]):
        return ("forward",)
    if layer.op.startswith("conv"):
        return ("forward", "backward-input", "backward-weight")
    return ("forward", "backward")


def build(
    layer: Layer, pass_: str, dtype: torch.dtype, layout: str, batch: int, data: str = "normal", seed: int = 0,
    device: str = "cpu",
) -> Case:  # fmt: skip
    """The calls of one entry."""
    make = Make(dtype, layout, data, torch.Generator().manual_seed(seed), device)
    builders = {
        "conv2d": _conv2d,
        "conv_transpose2d": _conv_transpose2d,
        "locally_connected2d": _locally_connected2d,
        "batch_norm": _batch_norm,
    }
    case = builders.get(layer.op, _pooling)(layer, pass_, batch, make)
    unseeded = case.parts

    def parts(result: Any) -> Iterator[Part]:
        make.generator.manual_seed(seed + 1)  # the same parts of cnnops' result and of PyTorch's
        yield from unseeded(result)

    case.parts = parts
    return case


class Make:
    """Makes tensors, and draws the part of a result that is checked."""

    def __init__(
        self, dtype: torch.dtype, layout: str, data: str, generator: torch.Generator, device: str = "cpu"
    ) -> None:
        self.dtype, self.format, self.data, self.generator = dtype, LAYOUTS[layout], data, generator
        self.device = device

    def _numbers(self, shape: Sequence[int], reach: int) -> Tensor:
        """Normal numbers, or of magnitudes from 10^-reach to 10^reach. Past a million they repeat, with a prime period
        so that no two images are the same: drawing all of them would take longer than what is timed."""
        count, period = math.prod(shape), 1_000_003
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        values = torch.randn(min(count, period), generator=self.generator, dtype=dtype)
        if reach:
            exponent = torch.rand(values.shape, generator=self.generator, dtype=torch.float64) * (2 * reach) - reach
            values = (values.sign() * 10**exponent).to(dtype)
        return values.repeat(-(-count // period))[:count].reshape(shape)

    def _finish(self, values: Tensor) -> Tensor:
        values = values.to(self.device, self.dtype)
        return values.contiguous(memory_format=self.format) if values.dim() == 4 else values

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Weights, and the factor that is not the data; positive where the data is."""
        values = self._numbers(shape, 0)
        return self._finish((values.abs_() if self.data == "positive" else values).mul_(scale))

    def image(self, *shape: int, reach: int = 30) -> Tensor:
        """Data in the chosen mode; ``reach`` is the wide mode's largest power of ten."""
        if self.data in ("normal", "positive"):
            return self.normal(*shape)
        if self.data == "offset":
            return self._finish(self._numbers(shape, 0).add_(100))
        return self._finish(self._numbers(shape, 3 if self.dtype == torch.float16 else reach))

    def some(self, count: int, among: int) -> Tensor:
        """Up to `count` of range(among), sorted; of several, one is the last, where tails are."""
        if count >= among:
            return torch.arange(among)
        if count <= 1:
            return torch.randint(among, (1,), generator=self.generator)
        picked = torch.randperm(among - 1, generator=self.generator)[: count - 1]
        return torch.cat((picked, torch.tensor([among - 1]))).sort().values


# ---- convolution -----------------------------------------------------------------------------------------------------


def _activate(name: str, z: Tensor) -> Tensor:
    """PyTorch's activation, in place where it can be: what a model would do."""
    if name == "none":
        return z
    if name in ("relu", "sigmoid", "tanh"):
        return getattr(torch, f"{name}_")(z)
    if name in ("gelu", "softplus"):
        return getattr(F, name)(z)
    return getattr(F, name)(z, inplace=True)


def _conv2d(layer: Layer, pass_: str, n: int, make: Make) -> Case:
    from .. import functional
    from ..ops.conv2d import gradients

    c, h, w, k, r, s, groups = (layer[key] for key in ("C", "H", "W", "K", "R", "S", "groups"))
    stride, pad, dilation = layer.pair("stride"), layer.pair("pad"), layer.pair("dilation")
    (p, q), activation = layer.output, layer.word("activation")
    geometry = [list(stride), list(pad), list(dilation), False, [0, 0], groups]
    fan = c // groups * r * s
    flops = 2 * n * layer.macs()
    chosen = _ConvPart(layer, n, make)

    def size(*tensors: Tensor | None) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    if pass_ == "forward":
        x, weight = make.image(n, c, h, w), make.normal(k, c // groups, r, s, scale=fan**-0.5)
        bias = make.normal(k) if layer["bias"] else None
        residual = make.normal(n, k, p, q) if layer["residual"] else None
        fused = partial(functional.conv2d, activation=None if activation == "none" else activation, residual=residual)

        def theirs() -> Tensor:
            z = F.conv2d(x, weight, bias, stride, pad, dilation, groups)
            return _activate(activation, z if residual is None else z.add_(residual))

        def parts(y: Tensor) -> Iterator[Part]:
            images, cs, ks, g = chosen.forward()
            xs, ws = x[images][:, cs].double(), weight[ks].double()
            bs = None if bias is None else bias[ks].double()
            expected = F.conv2d(xs, ws, bs, stride, pad, dilation, g)
            magnitude = F.conv2d(xs.abs(), ws.abs(), None if bs is None else bs.abs(), stride, pad, dilation, g)
            if residual is not None:
                add = residual[images][:, ks].double()
                expected, magnitude = expected + add, magnitude + add.abs()
            yield Part("output", y[images][:, ks], _activate(activation, expected), magnitude, fan)

        return Case(
            partial(fused, x, weight, bias, stride, pad, dilation, groups),
            theirs,
            parts,
            size(x, weight, bias, residual) + n * k * p * q * x.element_size(),
            flops,
        )

    aten = torch.ops.aten.convolution_backward.default
    if pass_ == "backward-input":
        dy, weight = make.image(n, k, p, q), make.normal(k, c // groups, r, s, scale=(k // groups * r * s) ** -0.5)
        # Only its shape counts; so below.
        x = torch.empty((n, c, h, w), dtype=make.dtype, device=make.device, memory_format=make.format)

        def input_parts(dx: Tensor) -> Iterator[Part]:
            images, cs, ks, g = chosen.backward_input()
            inner = slice(None) if g > 1 or groups > 1 else cs
            ws, dys = weight[ks][:, inner].double(), dy[images][:, ks].double()
            shape = (len(images), len(cs), h, w)
            gradient = partial(conv2d_input, shape, stride=stride, padding=pad, dilation=dilation, groups=g)
            yield Part(
                "input gradient",
                dx[images][:, cs],
                gradient(ws, dys),
                gradient(ws.abs(), dys.abs()),
                k // groups * r * s,
            )

        return Case(
            lambda: gradients(dy, x, weight, stride, pad, dilation, groups, (True, False, False))[0],
            lambda: aten(dy, x, weight, None, *geometry, [True, False, False])[0],
            input_parts,
            size(dy, weight, x),
            flops,
        )

    x, dy = make.image(n, c, h, w), make.normal(n, k, p, q, scale=(n * p * q) ** -0.5)
    weight = torch.empty((k, c // groups, r, s), dtype=make.dtype, device=make.device, memory_format=make.format)

    def weight_parts(dw: Tensor) -> Iterator[Part]:
        cs, ks, g = chosen.backward_weight()
        inner = slice(None) if groups > 1 else cs
        shape = (len(ks), len(cs) // g, r, s)
        gradient = partial(conv2d_weight, weight_size=shape, stride=stride, padding=pad, dilation=dilation, groups=g)
        expected = torch.zeros(shape, dtype=torch.float64, device=x.device)
        magnitude = torch.zeros_like(expected)
        step = max(1, (1 << 24) // (len(cs) * r * s * p * q))  # images at a time: PyTorch unfolds all it is given
        for i in range(0, n, step):
            xs, dys = x[i : i + step, cs].double(), dy[i : i + step, ks].double()
            expected += gradient(xs, grad_output=dys)
            magnitude += gradient(xs.abs(), grad_output=dys.abs())
        yield Part("weight gradient", dw[ks][:, inner], expected, magnitude, n * p * q)

    return Case(
        lambda: gradients(dy, x, weight, stride, pad, dilation, groups, (False, True, False))[1],
        lambda: aten(dy, x, weight, None, *geometry, [False, True, False])[1],
        weight_parts,
        size(dy, x, weight),
        flops,
    )


class _ConvPart:
    """Which images, input channels and output channels of a convolution are checked."""

    def __init__(self, layer: Layer, n: int, make: Make) -> None:
        self.c, self.k, self.groups, self.n, self.make = layer["C"], layer["K"], layer["groups"], n, make
        self.macs = layer.macs()

    def forward(self) -> tuple[Tensor, Tensor, Tensor, int]:
        images = self._images()
        if self.groups > 1:
            return images, *self._groups(len(images))
        return images, torch.arange(self.c), self._share(self.k, len(images)), 1

    def backward_input(self) -> tuple[Tensor, Tensor, Tensor, int]:
        images = self._images()
        if self.groups > 1:
            return images, *self._groups(len(images))
        return images, self._share(self.c, len(images)), torch.arange(self.k), 1

    def backward_weight(self) -> tuple[Tensor, Tensor, int]:
        if self.groups > 1:
            return self._groups(self.n)
        fraction = min(1.0, REFERENCE_MACS / (self.macs * self.n)) ** 0.5
        cs = self.make.some(max(4, round(self.c * fraction)), self.c)
        return cs, self.make.some(max(4, round(self.k * fraction)), self.k), 1

    def _images(self) -> Tensor:
        return self.make.some(1 if self.macs > REFERENCE_MACS else 2, self.n)

    def _share(self, channels: int, images: int) -> Tensor:
        return self.make.some(max(8, round(channels * REFERENCE_MACS / (self.macs * images))), channels)

    def _groups(self, images: int) -> tuple[Tensor, Tensor, int]:
        count = max(4, round(self.groups * REFERENCE_MACS / 8 / (self.macs * images)))
        picked = self.make.some(min(count, 16), self.groups)
        cs, ks = (
            (picked[:, None] * (channels // self.groups) + torch.arange(channels // self.groups)).flatten()
            for channels in (self.c, self.k)
        )
        return cs, ks, len(picked)


def _conv_transpose2d(layer: Layer, pass_: str, n: int, make: Make) -> Case:
    from .. import functional

    c, h, w, k, r, s, groups = (layer[key] for key in ("C", "H", "W", "K", "R", "S", "groups"))
    stride, pad, dilation, more = (layer.pair(key) for key in ("stride", "pad", "dilation", "output_pad"))
    p, q = layer.output
    arguments = (stride, pad, more, groups, dilation)
    fan = c // groups * math.ceil(r / stride[0]) * math.ceil(s / stride[1])
    x = make.image(n, c, h, w) if pass_ != "backward-input" else make.normal(n, c, h, w)
    weight = make.normal(c, k // groups, r, s, scale=fan**-0.5)
    bias = make.normal(k) if layer["bias"] else None
    itemsize, flops = x.element_size(), 2 * n * layer.macs()
    size = (n * c * h * w + n * k * p * q + weight.numel()) * itemsize
    macs = layer.macs()

    # The truth: groups (or, of one group, all channels) of some images; of the weights' gradient, some channels.
    def truth(result: Tensor, dy: Tensor | None) -> Iterator[Part]:
        images = make.some(1 if macs > REFERENCE_MACS else 2, n) if pass_ != "backward-weight" else torch.arange(n)
        every_c, every_k = torch.arange(c), torch.arange(k)
        cs, ks = every_c, every_k
        if groups == 1:
            fraction = min(1.0, REFERENCE_MACS / (macs * len(images)))
            if pass_ == "forward":
                ks = make.some(max(8, round(k * fraction)), k)
            elif pass_ == "backward-input":
                cs = make.some(max(8, round(c * fraction)), c)
            else:
                cs, ks = (make.some(max(4, round(size * fraction**0.5)), size) for size in (c, k))
        inner = slice(None) if groups > 1 else ks
        ws = weight[cs][:, inner].double()
        bs = None if bias is None else bias[ks].double()
        xs = x[images][:, cs].double()
        if pass_ == "forward":
            expected = F.conv_transpose2d(xs, ws, bs, *arguments)
            magnitude = F.conv_transpose2d(xs.abs(), ws.abs(), None if bs is None else bs.abs(), *arguments)
            yield Part("output", result[images][:, ks], expected, magnitude, fan)
            return
        assert dy is not None
        dys = dy[images][:, ks].double()

        def gradient(xs: Tensor, ws: Tensor, dys: Tensor) -> Tensor:
            xs, ws = xs.requires_grad_(), ws.requires_grad_()
            y = F.conv_transpose2d(xs, ws, None, *arguments)
            return torch.autograd.grad(y, xs if pass_ == "backward-input" else ws, dys)[0]

        expected, magnitude = gradient(xs, ws, dys), gradient(xs.detach().abs(), ws.detach().abs(), dys.abs())
        if pass_ == "backward-input":
            yield Part("input gradient", result[images][:, cs], expected, magnitude, k // groups * r * s)
        else:
            yield Part("weight gradient", result[cs][:, inner], expected, magnitude, n * h * w)

    if pass_ == "forward":
        size += k * itemsize if bias is not None else 0
        return Case(
            partial(functional.conv_transpose2d, x, weight, bias, *arguments),
            partial(F.conv_transpose2d, x, weight, bias, *arguments),
            lambda y: truth(y, None),
            size,
            flops,
        )
    dy = make.image(n, k, p, q) if pass_ == "backward-input" else make.normal(n, k, p, q, scale=(n * h * w) ** -0.5)
    wanted = x if pass_ == "backward-input" else weight
    wanted.requires_grad_()
    ours = functional.conv_transpose2d(x, weight, None, *arguments)
    theirs = F.conv_transpose2d(x, weight, None, *arguments)
    x, weight = x.detach(), weight.detach()
    return Case(
        lambda: torch.autograd.grad(ours, wanted, dy, retain_graph=True)[0],
        lambda: torch.autograd.grad(theirs, wanted, dy, retain_graph=True)[0],
        lambda d: truth(d, dy),
        size,
        flops,
    )


def locally_connected_by_unfolding(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], pad: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """What PyTorch users write for a locally connected layer; weight [P, Q, K, C, R, S], bias [K]."""
    p, q = weight.shape[:2]
    patches = F.unfold(x, weight.shape[4:], dilation, pad, stride)
    y = torch.einsum("nip,pki->nkp", patches, weight.flatten(3).flatten(0, 1)).unflatten(2, (p, q))
    return y if bias is None else y + _column(bias)


def _locally_connected2d(layer: Layer, pass_: str, n: int, make: Make) -> Case:
    from .. import functional

    c, h, w, k, r, s = (layer[key] for key in ("C", "H", "W", "K", "R", "S"))
    (p, q), fan = layer.output, c * r * s
    arguments = layer.pair("stride"), layer.pair("pad"), layer.pair("dilation")
    x, weight = make.image(n, c, h, w), make.normal(p, q, k, c, r, s, scale=fan**-0.5)
    bias = make.normal(k) if layer["bias"] else None
    once = (x.numel() + weight.numel() + n * k * p * q) * x.element_size()
    flops = 2 * n * layer.macs()

    if pass_ == "forward":

        def parts(y: Tensor) -> Iterator[Part]:
            images = make.some(2, n)
            inputs = [None if t is None else t.double() for t in (x[images], weight, bias)]
            absolute = [None if t is None else t.abs() for t in inputs]
            expected, magnitude = (locally_connected_by_unfolding(*of, *arguments) for of in (inputs, absolute))  # type: ignore
            yield Part("output", y[images], expected, magnitude, fan)

        return Case(
            lambda: functional.locally_connected2d(x, weight, bias, *arguments),
            lambda: locally_connected_by_unfolding(x, weight, bias, *arguments),
            parts,
            once,
            flops,
        )

    dy = make.normal(n, k, p, q)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    ours = functional.locally_connected2d(x, weight, None, *arguments)
    theirs = locally_connected_by_unfolding(x, weight, None, *arguments)

    def backward_parts(result: tuple[Tensor, ...]) -> Iterator[Part]:
        def gradients(absolute: bool) -> tuple[Tensor, ...]:
            xs, ws, dys = (t.detach().double() for t in (x, weight, dy))
            if absolute:
                xs, ws, dys = xs.abs(), ws.abs(), dys.abs()
            inputs = (xs.requires_grad_(), ws.requires_grad_())
            return torch.autograd.grad(locally_connected_by_unfolding(*inputs, None, *arguments), inputs, dys)

        expected, magnitude = gradients(False), gradients(True)
        yield Part("input gradient", result[0], expected[0], magnitude[0], k * r * s)
        yield Part("weight gradient", result[1], expected[1], magnitude[1], n)

    return Case(
        lambda: torch.autograd.grad(ours, leaves, dy, retain_graph=True),
        lambda: torch.autograd.grad(theirs, leaves, dy, retain_graph=True),
        backward_parts,
        once + (x.numel() + weight.numel()) * x.element_size(),
        2 * flops,
    )


# ---- pooling ---------------------------------------------------------------------------------------------------------


def median_by_sorting(x: Tensor, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> Tensor:
    """The contract of median_pool2d, slowly: padding takes no part, lower median, the first of equals."""
    x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=math.inf)
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)
    ordered, count = windows.detach().sort(dim=-1).values, windows.isfinite().sum(-1, keepdim=True)
    median = ordered.gather(-1, (count - 1) // 2)
    first = (windows.detach() == median).to(torch.uint8).argmax(-1, keepdim=True)
    return windows.gather(-1, first).squeeze(-1)


def median_by_unfolding(x: Tensor, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> Tensor:
    """What PyTorch users write for a median filter."""
    if any(pad):
        x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=math.nan)
    windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)
    return (windows.nanmedian(-1) if any(pad) else windows.median(-1)).values


def _pooling(layer: Layer, pass_: str, n: int, make: Make) -> Case:
    from .. import functional

    c, h, w = layer["C"], layer["H"], layer["W"]
    p, q = layer.output
    op = layer.op
    if op.startswith("adaptive"):
        arguments: tuple[Any, ...] = ((p, q),)
        terms = math.ceil(h / p) * math.ceil(w / q)
    else:
        kernel, stride, pad = layer.pair("kernel"), layer.pair("stride"), layer.pair("pad")
        arguments, terms = (kernel, stride, pad), math.prod(kernel)
        if op == "max_pool2d":
            arguments += (layer.pair("dilation"), bool(layer["ceil"]))
        elif op == "avg_pool2d":
            arguments += (bool(layer["ceil"]),)
    mine: Callable[..., Tensor] = getattr(functional, op)
    yours: Callable[..., Tensor] = median_by_unfolding if op == "median_pool2d" else getattr(F, op)
    exact: Callable[..., Tensor] = median_by_sorting if op == "median_pool2d" else yours
    averages = "avg" in op
    x = make.image(n, c, h, w)
    itemsize = x.element_size()
    images = make.some(max(1, min(2, REFERENCE_ELEMENTS // (c * h * w))), n)

    if pass_ == "forward":

        def parts(y: Tensor) -> Iterator[Part]:
            expected = exact(x[images].double(), *arguments)
            magnitude = exact(x[images].double().abs(), *arguments) if averages else expected.abs()
            yield Part("output", y[images], expected, magnitude, terms if averages else 1)

        return Case(
            lambda: mine(x, *arguments), lambda: yours(x, *arguments), parts, (x.numel() + n * c * p * q) * itemsize
        )

    dy = make.normal(n, c, p, q)
    inputs = x.requires_grad_()
    ours, theirs = mine(inputs, *arguments), yours(inputs, *arguments)
    x = x.detach()

    def backward_parts(dx: Tensor) -> Iterator[Part]:
        xs, dys = x[images].double().requires_grad_(), dy[images].double()
        y = exact(xs, *arguments)
        (expected,) = torch.autograd.grad(y, xs, dys, retain_graph=True)
        (magnitude,) = torch.autograd.grad(y, xs, dys.abs())
        yield Part("input gradient", dx[images], expected, magnitude, terms)

    # Where the maximum was is one byte per output.
    place = 0 if averages else dy.numel()
    return Case(
        lambda: torch.autograd.grad(ours, inputs, dy, retain_graph=True)[0],
        lambda: torch.autograd.grad(theirs, inputs, dy, retain_graph=True)[0],
        backward_parts,
        (x.numel() + dy.numel()) * itemsize + place,
    )


# ---- batch norm ------------------------------------------------------------------------------------------------------

# Where an activation's derivative jumps: there a rounding of its argument decides, and no answer is wrong.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def _batch_norm(layer: Layer, pass_: str, n: int, make: Make) -> Case:
    from .. import functional

    c, h, w = layer["C"], layer["H"], layer["W"]
    training, activation, eps, momentum = bool(layer["training"]), layer.word("activation"), 1e-5, 0.1
    x = make.image(n, c, h, w, reach=15)  # its squares must be finite
    weight, bias = make.normal(c), make.normal(c)
    mean, var = make.normal(c), make.normal(c).abs() + 0.5
    residual = make.normal(n, c, h, w) if layer["residual"] else None
    count, itemsize = n * h * w, x.element_size()
    channels = make.some(max(1, min(8, REFERENCE_ELEMENTS // count)), c)
    fused: dict[str, Any] = {} if activation == "none" else {"activation": activation}
    if residual is not None:
        fused["residual"] = residual

    def apply_theirs(x: Tensor, m: Tensor, v: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        z = F.batch_norm(x, m, v, weight, bias, training, momentum, eps)
        return _activate(activation, z if residual is None else z.add_(residual))

    def exact(inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the chosen channels: the result before its activation, mean, variance, and the terms' magnitude."""
        xs, ws, bs = inputs[:3]
        m, v = mean[channels].double(), var[channels].double()
        if training:
            m, v = xs.mean((0, 2, 3)), xs.var((0, 2, 3), correction=0)
        scale = (v + eps).rsqrt()
        z = (xs - _column(m)) * _column(scale * ws) + _column(bs)
        spread = (xs.abs() + _column(m.abs())) * _column(scale)
        magnitude = spread * _column(ws.abs()) + _column(bs.abs())
        if len(inputs) > 3:
            z, magnitude = z + inputs[3], magnitude + inputs[3].abs()
        return z, m, v, magnitude

    def chosen(t: Tensor) -> Tensor:
        return t.detach()[channels].double() if t.dim() == 1 else t.detach()[:, channels].double()

    bytes_read = (2 if training else 1) * x.numel() + (residual.numel() if residual is not None else 0)
    terms = count if training else 1
    if pass_ == "forward":
        state = [(mean.clone(), var.clone()) for _ in range(2)]

        def ours() -> tuple[Tensor, ...]:
            m, v = state[0]
            return functional.batch_norm(x, m, v, weight, bias, training, momentum, eps, **fused), m, v

        def theirs() -> tuple[Tensor, ...]:
            m, v = state[1]
            return apply_theirs(x, m, v, weight, bias, residual), m, v

        def parts(result: tuple[Tensor, ...]) -> Iterator[Part]:
            """Of the first call: the running statistics move with every one."""
            y, new_mean, new_var = result
            z, m, v, magnitude = exact([chosen(t) for t in (x, weight, bias, residual) if t is not None])
            # No activation here is steeper than 1.13 (silu, gelu).
            yield Part("output", chosen_raw(y), _activate(activation, z), 1.13 * magnitude, terms)
            if training:
                old_mean, old_var = mean[channels].double(), var[channels].double()
                unbiased = v * count / max(count - 1, 1)
                away = x.detach()[:, channels].double().abs().mean((0, 2, 3))
                yield Part(
                    "running mean", new_mean[channels], old_mean * (1 - momentum) + m * momentum,
                    old_mean.abs() + away, terms,
                )  # fmt: skip
                yield Part(
                    "running variance", new_var[channels], old_var * (1 - momentum) + unbiased * momentum,
                    old_var + unbiased, terms,
                )  # fmt: skip

        def chosen_raw(y: Tensor) -> Tensor:
            return y[:, channels]

        return Case(ours, theirs, parts, (bytes_read + x.numel()) * itemsize)

    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    dy = make.normal(n, c, h, w, scale=count**-0.5)
    if activation in KINKS:
        with torch.no_grad():
            z = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, momentum, eps)
            z = z if residual is None else z + residual
            near = max(1e-3, 8 * torch.finfo(make.dtype).eps)
            for kink in KINKS[activation]:
                dy.masked_fill_((z - kink).abs() < near, 0)
            del z
    mine = functional.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, momentum, eps, **fused)
    yours = apply_theirs(x, mean.clone(), var.clone(), weight, bias, residual)

    def backward_parts(result: tuple[Tensor, ...]) -> Iterator[Part]:
        inputs = [chosen(t).requires_grad_() for t in leaves]
        z, m, v, terms_of_z = exact(inputs)
        dz = dys = chosen(dy)
        if activation != "none":
            at = z.detach().requires_grad_()
            (dz,) = torch.autograd.grad(_activate(activation, at.clone()), at, dys)
        expected = torch.autograd.grad(z, inputs, dz)
        scale, size = (v.detach() + eps).rsqrt(), dz.abs()
        if activation not in ("none", "relu", "leaky_relu", "relu6"):  # the slope follows z, at a rate of less than 1
            size = size + dys.abs() * terms_of_z.detach()
        spread = (inputs[0].detach().abs() + _column(m.detach().abs())) * _column(scale)
        total = size
        if training:
            total = size + _column(size.mean((0, 2, 3))) + spread * _column((size * spread).mean((0, 2, 3)))
        magnitudes = [
            total * _column(scale * inputs[1].detach().abs()),
            (size * spread).sum((0, 2, 3)),
            size.sum((0, 2, 3)),
            size,
        ]
        for name, got, want, magnitude in zip(
            ("input gradient", "weight gradient", "bias gradient", "residual gradient"),
            result, expected, magnitudes, strict=False,
        ):  # fmt: skip
            sums = name in ("weight gradient", "bias gradient") or training
            yield Part(
                name, got[channels] if got.dim() == 1 else got[:, channels], want, magnitude, count if sums else 1
            )

    # The sums over x and dy must be known before the first dx: both are read twice in training.
    moved = (2 if training else 1) * (x.numel() + dy.numel()) + x.numel() * (2 if residual is not None else 1)
    return Case(
        lambda: torch.autograd.grad(mine, leaves, dy, retain_graph=True),
        lambda: torch.autograd.grad(yours, leaves, dy, retain_graph=True),
        backward_parts,
        moved * itemsize,
    )


def _column(t: Tensor) -> Tensor:
    return t[None, :, None, None]
