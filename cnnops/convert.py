"""Exchanging the layers of an existing model: :func:`convert_` and :func:`revert_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.utils import parametrize

from . import nn

Filter = Callable[[str, torch.nn.Module], bool]

_NAMES = (
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "GELU",
    "Hardswish",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "SiLU",
)
_TO_CNNOPS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in _NAMES}
_TO_TORCH: dict[type, type] = {ours: torchs for torchs, ours in _TO_CNNOPS.items()}
_ONLY_CNNOPS = (nn.MedianPool2d, nn.LocallyConnected2d)


class Swapped(NamedTuple):
    """A layer whose class was exchanged."""

    name: str  #: qualified, as in ``named_modules()``; of a shared layer all names, with commas between
    from_type: type
    to_type: type


class Skipped(NamedTuple):
    """A layer that looks as if it could be exchanged, and was left."""

    name: str  #: as in :class:`Swapped`
    type: type
    reason: str


@dataclass
class Report:
    """What :func:`convert_` or :func:`revert_` did. Prints as a table.

    >>> report = cnnops.convert_(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh()))
    >>> [(name, before.__module__, after.__module__) for name, before, after in report.swapped]
    [('0', 'torch.nn.modules.conv', 'cnnops.nn')]
    """

    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("layer", "was", "is now")]
        rows += [(s.name or "(the model)", _show(s.from_type), _show(s.to_type)) for s in self.swapped]
        rows += [(s.name or "(the model)", _show(s.type), f"left: {s.reason}") for s in self.skipped]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {before:<{widths[1]}}  {after}" for name, before, after in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        summary = f"{len(self.swapped)} swapped, {len(self.skipped)} left"
        return "\n".join([*lines, summary]) if len(rows) > 1 else summary

    __repr__ = __str__


def convert_(model: torch.nn.Module, filter_fn: Filter | None = None) -> Report:
    """Makes a model compute with cnnops, in place: each layer of torch.nn that cnnops has becomes cnnops's.

    Only ``module.__class__`` changes, and only where it is exactly ``torch.nn.Conv2d``, ``ConvTranspose2d``,
    ``MaxPool2d``, ``AvgPool2d``, ``AdaptiveAvgPool2d``, ``AdaptiveMaxPool2d``, ``BatchNorm2d``, or ``ReLU``, ``ReLU6``,
    ``SiLU``, ``Hardswish`` or ``GELU`` (these for the memory of their results alone). So parameters and the optimizers
    that hold them, buffers, hooks, shared layers, ``state_dict`` keys, ``isinstance``, pickling and copying stay as
    they were. A layer with parametrizations (``torch.nn.utils.parametrizations``) keeps them.

    Left alone, with the reason in the report: subclasses (their ``forward`` may differ), lazy layers (run a batch
    through the model, then convert again), quantized layers, ``SyncBatchNorm``, TorchScript modules, and layers whose
    ``forward`` was replaced on the instance. Layers of any dtype and on any device are exchanged: what the kernels do
    not take, cnnops computes with PyTorch's own ops.

    Args:
        model: the model; if it is itself such a layer, it is exchanged.
        filter_fn: ``filter_fn(name, module)`` says whether to exchange a layer; a shared layer is exchanged if every
            one of its names passes.

    Returns:
        A :class:`Report`: ``swapped``, ``skipped``; prints as a table. A second call finds nothing left to swap.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> len(cnnops.convert_(model).swapped), type(model[0]).__module__
        (3, 'cnnops.nn')
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """
    return _exchange("convert_", model, _TO_CNNOPS, _why_not_convert, filter_fn)


def revert_(model: torch.nn.Module, filter_fn: Filter | None = None) -> Report:
    """Undoes :func:`convert_`: each layer of cnnops becomes torch.nn's again.

    Call it before handing a model to something that must know its layers by their exact class, such as
    ``torch.jit.script``, the exporter to ONNX or a quantizer.

    Args:
        model: the model, changed in place.
        filter_fn: as for :func:`convert_`.

    Returns:
        A :class:`Report`. Skipped are layers that torch.nn cannot express: those with ``activation``, with
        ``padding="full"`` or a strided ``"same"``, and the kinds that torch.nn does not have.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.

    Example:
        >>> model = torch.nn.Sequential(cnnops.nn.Conv2d(3, 8, 3), cnnops.nn.MedianPool2d(3))
        >>> report = cnnops.revert_(model)
        >>> type(model[0]) is torch.nn.Conv2d, report.skipped[0].reason
        (True, 'torch.nn has no such layer')
    """
    return _exchange("revert_", model, _TO_TORCH, _why_not_revert, filter_fn)


def _exchange(
    function: str,
    model: torch.nn.Module,
    twins: dict[type, type],
    why_not: Callable[[torch.nn.Module], str | None],
    filter_fn: Filter | None,
) -> Report:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")
    report = Report()
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in _walk(model, "", ()):
        names.setdefault(module, []).append(name)
    for module, all_names in names.items():
        before, label = type(module), ", ".join(all_names)
        parametrized = parametrize.is_parametrized(module) and before.__name__.startswith("Parametrized")
        twin = twins.get(before.__bases__[0] if parametrized else before)
        reason = why_not(module)
        if twin is None and reason is None:
            continue
        if reason is None and filter_fn is not None and not all(filter_fn(name, module) for name in all_names):
            reason = "filter_fn said no"
        if reason is not None:
            report.skipped.append(Skipped(label, before, reason))
            continue
        assert twin is not None
        module.__class__ = _parametrized(before, twin) if parametrized else twin
        report.swapped.append(Swapped(label, before, type(module)))
    return report


def _walk(module: torch.nn.Module, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules under all their names; what contains itself is entered once, TorchScript's are not entered."""
    yield name, module
    if isinstance(module, torch.jit.ScriptModule):
        return
    above = (*above, id(module))
    for child_name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, above)


def _parametrized(dynamic: type, base: type) -> type:
    """The class that torch.nn.utils.parametrize made for one module, upon another base.

    Never that class changed in place: the module's deep copies share it.
    """
    members = {k: v for k, v in vars(dynamic).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(f"Parametrized{base.__name__}", (base,), members)


def _why_not_convert(module: torch.nn.Module) -> str | None:
    kind: Any = parametrize.type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if kind in _TO_CNNOPS:
        return _own_forward(module)
    if issubclass(kind, tuple(_TO_TORCH)):
        return None  # cnnops's own already, or a subclass of it
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "quantized"
    if kind is torch.nn.SyncBatchNorm:
        return "synchronizes its statistics between processes"
    if getattr(kind, "cls_to_become", None) in _TO_CNNOPS:
        return "lazy: convert again after its first batch"
    layer = next((k for k in _TO_CNNOPS if issubclass(kind, k)), None)
    return f"a subclass of torch.nn.{layer.__name__}, whose forward may be its own" if layer else None


def _why_not_revert(module: torch.nn.Module) -> str | None:
    kind: Any = parametrize.type_before_parametrizations(module)
    if kind in _ONLY_CNNOPS:
        return "torch.nn has no such layer"
    if kind in _TO_TORCH:
        if getattr(module, "activation", None) is not None:
            return f"torch.nn has no activation={module.activation!r} in this layer"
        if isinstance(module, nn.Conv2d):
            padding: Any = module.padding
            if padding == "full" or (padding == "same" and module.stride != (1, 1)):
                return f"torch.nn has no padding={padding!r} with stride {module.stride}"
        return _own_forward(module)
    ours = next((k for k in (*_TO_TORCH, *_ONLY_CNNOPS) if issubclass(kind, k)), None)
    return None if ours is None else f"a subclass of cnnops.nn.{ours.__name__}"


def _own_forward(module: torch.nn.Module) -> str | None:
    replaced = [name for name in ("forward", "_conv_forward") if name in vars(module)]
    return f"its {replaced[0]} was replaced on the instance" if replaced else None


def _show(kind: type) -> str:
    package = kind.__module__.split(".")[0]
    if kind.__name__.startswith("Parametrized"):
        package = kind.__bases__[0].__module__.split(".")[0]
    return f"{package}.nn.{kind.__name__}" if package in ("torch", "cnnops") else f"{kind.__module__}.{kind.__name__}"


__all__ = ["Report", "Skipped", "Swapped", "convert_", "revert_"]
