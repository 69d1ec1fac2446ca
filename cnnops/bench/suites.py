"""Layers to time: the text files in ``suites/``, one line per distinct layer of a network (``memory`` is no network).

A line is the op's name and ``key=value`` pairs, e.g. ::

    conv2d C=64 H=56 W=56 K=64 R=3 S=3 stride=1 pad=1 dilation=1 groups=1 bias=0 count=3

with C H W the input's channels, height and width, K the output channels, R S the filter, ``count`` how often the layer
occurs; a pair (height,width) where the two axes differ. ``#`` begins a comment. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

SUITES = ("resnet50", "vgg16", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "unet", "memory")

# The keys of each op in the order they are written, and what a left-out one means (None: it must be there).
KEYS: dict[str, dict[str, int | str | None]] = {
    "conv2d": {
        "C": None, "H": None, "W": None, "K": None, "R": None, "S": None,
        "stride": 1, "pad": 0, "dilation": 1, "groups": 1, "bias": 0, "activation": "none", "residual": 0,
    },
    "conv_transpose2d": {
        "C": None, "H": None, "W": None, "K": None, "R": None, "S": None,
        "stride": 1, "pad": 0, "output_pad": 0, "dilation": 1, "groups": 1, "bias": 0,
    },
    "locally_connected2d": {
        "C": None, "H": None, "W": None, "K": None, "R": None, "S": None,
        "stride": 1, "pad": 0, "dilation": 1, "bias": 0,
    },
    "max_pool2d": {"C": None, "H": None, "W": None, "kernel": None, "stride": None, "pad": 0, "dilation": 1, "ceil": 0},
    "avg_pool2d": {"C": None, "H": None, "W": None, "kernel": None, "stride": None, "pad": 0, "ceil": 0},
    "median_pool2d": {"C": None, "H": None, "W": None, "kernel": None, "stride": None, "pad": 0},
    "adaptive_avg_pool2d": {"C": None, "H": None, "W": None, "P": None, "Q": None},
    "adaptive_max_pool2d": {"C": None, "H": None, "W": None, "P": None, "Q": None},
    "batch_norm": {"C": None, "H": None, "W": None, "training": 1, "activation": "none", "residual": 0},
}  # fmt: skip
PAIRS = frozenset(("kernel", "stride", "pad", "dilation", "output_pad"))
WORDS = frozenset(("activation",))
# Keys that are written only where they differ from what leaving them out means.
OPTIONAL = frozenset(("activation", "residual", "training", "ceil"))


class SuiteError(ValueError):
    """A suite's text is not in the format."""


@dataclass(frozen=True)
class Layer:
    """One line of a suite. ``values`` has every key of the op, pairs as tuples."""

    op: str
    values: tuple[tuple[str, int | str | tuple[int, int]], ...]
    count: int = 1

    @cached_property
    def _map(self) -> dict[str, int | str | tuple[int, int]]:
        return dict(self.values)

    def __getitem__(self, key: str) -> int:
        value = self._map[key]
        assert isinstance(value, int)
        return value

    def pair(self, key: str) -> tuple[int, int]:
        value = self._map[key]
        assert isinstance(value, tuple)
        return value

    def word(self, key: str) -> str:
        return str(self._map[key])

    @cached_property
    def text(self) -> str:
        """The line without ``count``: the layer's name in tables, in JSON and for filters."""
        parts = [self.op]
        for key, value in self.values:
            if key in OPTIONAL and value == KEYS[self.op][key]:
                continue
            if isinstance(value, tuple):
                value = value[0] if value[0] == value[1] else f"{value[0]},{value[1]}"
            parts.append(f"{key}={value}")
        return " ".join(parts)

    def line(self) -> str:
        return f"{self.text} count={self.count}"

    @cached_property
    def output(self) -> tuple[int, int]:
        """P and Q, the output's height and width."""
        size = self["H"], self["W"]
        if self.op == "batch_norm":
            return size
        if self.op.startswith("adaptive"):
            return self["P"], self["Q"]
        stride, pad = self.pair("stride"), self.pair("pad")
        kernel = self.pair("kernel") if "kernel" in self._map else (self["R"], self["S"])
        dilation = self.pair("dilation") if "dilation" in self._map else (1, 1)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if self.op == "conv_transpose2d":
            more = self.pair("output_pad")
            p, q = ((size[i] - 1) * stride[i] - 2 * pad[i] + reach[i] + more[i] for i in (0, 1))
            return p, q
        out = []
        for i in (0, 1):
            room = size[i] + 2 * pad[i] - reach[i]
            steps = -(-room // stride[i]) if self._map.get("ceil") else room // stride[i]
            if self._map.get("ceil") and steps * stride[i] >= size[i] + pad[i]:
                steps -= 1  # a window must begin inside the image or the padding before it
            out.append(steps + 1)
        return out[0], out[1]

    def macs(self) -> int:
        """Multiply-adds of one image's forward pass; 0 where the op is no convolution."""
        p, q = self.output
        if self.op == "locally_connected2d":
            return self.weights()
        if self.op == "conv2d":
            return p * q * self["K"] * self["R"] * self["S"] * (self["C"] // self["groups"])
        if self.op == "conv_transpose2d":
            return self["H"] * self["W"] * self["C"] * self["R"] * self["S"] * (self["K"] // self["groups"])
        return 0

    def weights(self) -> int:
        """Elements of a convolution's weight."""
        if self.op == "locally_connected2d":
            p, q = self.output
            return p * q * self["K"] * self["C"] * self["R"] * self["S"]
        if not self.op.startswith("conv"):
            return 0
        return self["C"] * self["K"] // self["groups"] * self["R"] * self["S"]


def parse_line(line: str) -> Layer:
    """One line of a suite as a Layer.

    >>> parse_line("max_pool2d C=64 H=112 W=112 kernel=3 stride=2 pad=1").output
    (56, 56)
    """
    op, *fields = line.split()
    if op not in KEYS:
        raise SuiteError(f"unknown op {op!r} in {line!r}; the ops are {', '.join(KEYS)}")
    given: dict[str, str] = {}
    for field in fields:
        key, separator, value = field.partition("=")
        if not separator or key in given or (key not in KEYS[op] and key != "count"):
            raise SuiteError(f"{field!r} in {line!r} is not a key of {op} with a value, or comes twice")
        given[key] = value
    count = _integer(given.pop("count", "1"), line)
    values: list[tuple[str, int | str | tuple[int, int]]] = []
    for key, default in KEYS[op].items():
        text = given.get(key, default)
        if text is None and key == "stride":
            text = given.get("kernel")
        if text is None:
            raise SuiteError(f"{op} needs {key}= in {line!r}")
        if key in WORDS:
            values.append((key, str(text)))
        elif key in PAIRS:
            numbers = [_integer(part, line) for part in str(text).split(",")]
            if len(numbers) > 2:
                raise SuiteError(f"{key} takes one number or two in {line!r}")
            values.append((key, (numbers[0], numbers[-1])))
        else:
            values.append((key, _integer(text, line)))
    return Layer(op, tuple(values), count)


def _integer(text: int | str, line: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SuiteError(f"{text!r} in {line!r} is not a whole number") from None


def parse(text: str) -> list[Layer]:
    """The layers of a suite's text."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [parse_line(line) for line in lines if line]


def load(suite: str) -> list[Layer]:
    """The layers of a suite that comes with the package, or of a text file."""
    if suite in SUITES:
        return parse((resources.files(__package__) / "suites" / f"{suite}.txt").read_text(encoding="utf-8"))
    try:
        with open(suite, encoding="utf-8") as file:
            return parse(file.read())
    except OSError as error:
        raise SuiteError(f"{suite!r} is neither a suite ({', '.join(SUITES)}) nor a file: {error.strerror}") from None


def matches(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether every pattern (a regular expression) is found in the layer's text."""
    return all(re.search(pattern, layer.text) for pattern in patterns)
