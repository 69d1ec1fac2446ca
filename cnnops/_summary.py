"""A model's layers with output shapes, parameters, multiply-adds and receptive fields (``cnnops.summary``)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from . import ops as _ops  # noqa: F401  (registers torch.ops.cnnops.*)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Pair = tuple[float, float]


@dataclass(frozen=True)
class Field:
    """A receptive field, in pixels of the model's input: its size, and the step from one output's to the next's."""

    size: Pair = (1, 1)
    jump: Pair = (1, 1)

    def window(self, kernel: Sequence[float], stride: Sequence[float], dilation: Sequence[float] = (1, 1)) -> Field:
        size = tuple(r + (k - 1) * d * j for r, k, d, j in zip(self.size, kernel, dilation, self.jump, strict=True))
        return Field(size, tuple(j * s for j, s in zip(self.jump, stride, strict=True)))  # type: ignore[arg-type]

    @staticmethod
    def join(fields: list[Field]) -> Field:
        """Of a sum or a concatenation: the longest path's."""
        return Field(
            (max(f.size[0] for f in fields), max(f.size[1] for f in fields)),
            (max(f.jump[0] for f in fields), max(f.jump[1] for f in fields)),
        )


WHOLE = (math.inf, math.inf)


@dataclass
class Row:
    """One layer: a module without children, at one of its calls."""

    name: str
    type: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    receptive_field: tuple[float, float] | None
    jump: tuple[float, float] | None


@dataclass
class Summary:
    """What :func:`summary` found; prints as a table."""

    rows: list[Row] = field(default_factory=list)
    input_size: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a receptive field of the whole input is "all"."""

        def pixels(pair: Pair | None) -> list[float] | str | None:
            return None if pair is None else "all" if pair == WHOLE else list(pair)

        rows = [
            {**vars(row), "receptive_field": pixels(row.receptive_field), "jump": pixels(row.jump)} for row in self.rows
        ]
        return {
            "input_size": list(self.input_size),
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "layers": rows,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("layer", "type", "output shape"):
            table.add_column(column, no_wrap=True)
        for column in ("parameters", "multiply-adds", "receptive field", "stride"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name, row.type, "x".join(map(str, row.output)),
                f"{row.parameters:,}" if row.parameters else "", f"{row.multiply_adds:,}" if row.multiply_adds else "",
                _pixels(row.receptive_field), "" if row.receptive_field == WHOLE else _pixels(row.jump),
            )  # fmt: skip
        yield table
        shape = "x".join(map(str, self.input_size))
        yield f"\ninput {shape}: {self.parameters:,} parameters, {self.multiply_adds:,} multiply-adds"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None, force_terminal=False, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    __repr__ = __str__


def _pixels(pair: Pair | None) -> str:
    if pair is None:
        return ""
    if pair == WHOLE:
        return "all"
    first, second = (f"{value:g}" for value in pair)
    return first if first == second else f"{first}x{second}"


class _Fields(TorchDispatchMode):
    """Follows receptive fields from tensor to tensor, through whatever ops the model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = [self.of[t] for t in _tensors((args, kwargs)) if t in self.of]
        if before:
            names = [argument.name for argument in func._schema.arguments]
            named = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            after = self.step(func.__name__.split(".")[0], Field.join(before), named, args, out)
            for t in _tensors(out):
                self.of[t] = after
        return out

    def step(self, name: str, at: Field, named: dict[str, Any], args: tuple[Any, ...], out: Any) -> Field:
        x, y = _first(args), _first(out)
        if x is None or y is None or "backward" in name:
            return at
        weight = named.get("weight", named.get("w"))
        dilation = _two(named.get("dilation") or (1, 1))
        # By the arguments' names rather than the op's: torch's and cnnops' operators have these in common.
        if isinstance(weight, Tensor) and weight.dim() >= 4 and "stride" in named:
            taps, stride = weight.shape[-2:], _two(named["stride"])
            transposed = named.get("transposed") or "transpose" in name or "input_grad" in name
            return _transposed(at, taps, stride, dilation) if transposed else at.window(taps, stride, dilation)
        kernel = named.get("kernel_size", named.get("kernel"))
        if "pool2d" in name and kernel is not None:
            return at.window(_two(kernel), _two(named.get("stride") or kernel), dilation)
        if "adaptive" in name and y.dim() >= 3:
            if tuple(y.shape[-2:]) == (1, 1):
                return at if tuple(x.shape[-2:]) == (1, 1) else Field(WHOLE, WHOLE)
            steps = [x.shape[i] / y.shape[i] for i in (-2, -1)]
            return at.window([math.ceil(s) for s in steps], steps)
        if "upsample" in name:
            reach = 4 if "bicubic" in name else 2 if "bilinear" in name else 1
            return at.window((reach, reach), [x.shape[i] / y.shape[i] for i in (2, 3)])
        if name in ("mean", "sum", "amax", "amin") and x.dim() == 4:
            dims = {d % 4 for d in named.get("dim") or range(4)}
            if dims >= {2, 3} and x.shape[2] * x.shape[3] > 1:
                return Field(WHOLE, WHOLE)
        if name == "bmm" or "attention" in name:
            return Field(WHOLE, WHOLE)
        return at


def _transposed(at: Field, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Field:
    # An output pixel meets every stride-th tap of the filter.
    taps = [math.ceil(((k - 1) * d + 1) / s) for k, d, s in zip(kernel, dilation, stride, strict=True)]
    return at.window(taps, [1 / s for s in stride])


def _two(value: Sequence[int]) -> Sequence[int]:
    return value if len(value) == 2 else (value[0], value[0])


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _first(tree: Any) -> Tensor | None:
    return next(_tensors(tree), None)


def _multiply_adds(module: nn.Module, x: Tensor, y: Tensor) -> int:
    match module:
        case nn.Linear():
            return y.numel() * module.in_features
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return y.numel() * math.prod(module.weight.shape[1:])
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return x.numel() * math.prod(module.weight.shape[1:])
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "LocallyConnected2d" and isinstance(weight, Tensor):
        return weight.numel() * y.shape[0]
    return 0


def summary(model: nn.Module, input_size: Sequence[int] = (3, 224, 224), *, batch: int = 1) -> Summary:
    """The layers of a model: output shapes, parameters, multiply-adds, receptive fields.

    The model runs once in evaluation mode on meta tensors: nothing is computed, and neither its parameters nor its
    running statistics are touched.

    The receptive field of an output is the part of the input that it can depend on. Along a path it follows
    r += (kernel - 1) * dilation * jump, jump *= stride (Araujo, Norris, Sim: "Computing Receptive Fields of
    Convolutional Neural Networks", Distill 2019, doi 10.23915/distill.00021); where paths meet, the longest one counts.
    A transposed convolution divides the jump by its stride. It may be larger than the input; "all" stands for a layer
    that sees everything (a global mean, a linear layer over flattened pixels, attention).

    Args:
        model: any module that takes one tensor and runs on meta tensors.
        input_size: ``(C, H, W)``, in pixels.
        batch: images in the batch; multiply-adds are for the whole batch.

    Returns:
        A :class:`Summary`: prints as a table; ``rows``, ``parameters`` (each counted once), ``multiply_adds`` (of
        convolutions and linear layers), ``to_dict()``.

    Raises:
        TypeError: model is not a ``torch.nn.Module``; ValueError: input_size is not positive numbers.

    Example:
        >>> cnnops.summary(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32)).multiply_adds
        221184
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary(): model must be a torch.nn.Module, not {type(model).__name__}")
    shape = (batch, *input_size)
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"summary(): batch and input_size must be positive numbers, but got {batch} and {input_size}")
    result = Summary(input_size=shape)
    fields = _Fields()
    counted: set[int] = set()
    extent = [math.prod(input_size[-2:]) if len(input_size) == 3 else 1]  # pixels of the last image that went by

    def observe(name: str, module: nn.Module) -> Callable[..., None]:
        own = list(module.parameters())

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, y = _first(args), _first(output)
            if x is None or y is None:
                return
            at = fields.of.get(y)
            # A linear layer over flattened pixels sees all of them.
            if isinstance(module, nn.Linear) and at is not None and x.dim() == 2 and extent[0] > 1:
                at = Field(WHOLE, WHOLE)
                fields.of[y] = at
            if y.dim() == 4:
                extent[0] = y.shape[2] * y.shape[3]
            new = [p for p in own if id(p) not in counted]
            counted.update(id(p) for p in new)
            result.rows.append(
                Row(
                    name or type(module).__name__,
                    type(module).__name__,
                    tuple(y.shape),
                    sum(p.numel() for p in new),
                    _multiply_adds(module, x, y),
                    at.size if at else None,
                    at.jump if at else None,
                )
            )

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(True for _ in m.children())]
    # A module whose parameters are not its children's (a container with weights of its own) is a layer too.
    containers = [(n, m) for n, m in model.named_modules() if any(True for _ in m.children())]
    modes = [(m, m.training) for m in model.modules()]
    weights = itertools.chain(model.named_parameters(), model.named_buffers())
    meta = {n: torch.empty_like(t, device="meta", requires_grad=False) for n, t in weights}
    dtype = next((t.dtype for t in meta.values() if t.is_floating_point()), torch.get_default_dtype())
    x = torch.empty(shape, dtype=dtype, device="meta")
    handles = [m.register_forward_hook(observe(n, m)) for n, m in leaves]
    try:
        model.eval()
        fields.of[x] = Field()
        with torch.no_grad(), fields:
            torch.func.functional_call(model, meta, (x,))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    for name, module in containers:
        rest = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        if rest:
            counted.update(id(p) for p in rest)
            size = sum(p.numel() for p in rest)
            result.rows.append(Row(name or type(module).__name__, type(module).__name__, (), size, 0, None, None))
    return result
