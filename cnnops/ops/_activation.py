"""The activations that operators fuse, by name, with PyTorch's default parameters.

The list itself is the extension's (``csrc/common/activation.h``); an operator's schema carries an index into it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._core import C

NAMES: tuple[str, ...] = tuple(C.activations)
INDEX: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(NAMES) if i}}
# Those whose derivative is known from their result alone.
OUTPUT_IS_ENOUGH = frozenset(i for i, name in enumerate(NAMES) if name not in ("silu", "hardswish", "gelu"))

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def index(op: str, name: str | None) -> int:
    """The number under which kernels know an activation; None is no activation."""
    try:
        return INDEX[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"{op}(): activation must be None or one of {', '.join(NAMES[1:])}, but got {name!r}"
        ) from None


def apply(x: Tensor, activation: int) -> Tensor:
    """The activation by PyTorch's own function."""
    return FUNCTIONS[NAMES[activation]](x) if activation else x


__all__ = ["FUNCTIONS", "INDEX", "NAMES", "OUTPUT_IS_ENOUGH", "apply", "index"]
