"""Imports torchvision beside a CPU-only torch, whatever wheel of torchvision is installed.

A torchvision built for another torch leaves its compiled operators out, and then fails while it registers fakes for
them (``operator torchvision::nms does not exist``). The model definitions need none of those operators, so while
torchvision is imported, a registration for one that does not exist is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _import() -> Any:
    register_fake = torch.library.register_fake

    def tolerant(op: Any, func: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        if func is None:
            return lambda f: tolerant(op, f, **options)
        try:
            return register_fake(op, func, **options)
        except RuntimeError:
            if not str(op).startswith("torchvision::"):
                raise
            return func

    torch.library.register_fake = tolerant
    try:
        import torchvision.models
    finally:
        torch.library.register_fake = register_fake
    return torchvision


torchvision = _import()
