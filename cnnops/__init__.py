"""cnnops: hand-written C++ and CUDA kernels for convolutional networks, as drop-in PyTorch operators.

>>> import cnnops
>>> report = cnnops.convert_(model)      # the same model, on cnnops kernels
>>> y = cnnops.functional.conv2d(x, w, padding="same", activation="relu")

Importing this package is cheap; torch and the extension are loaded at first use (at once, where torch is loaded
already).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional as functional
    from . import memory as memory
    from . import nn as nn
    from ._info import info as info
    from ._summary import summary as summary
    from .convert import convert_ as convert_
    from .convert import revert_ as revert_
    from .patch import patch_aten as patch_aten

_MODULES = ("functional", "memory", "nn")
_NAMES = {
    "convert_": "convert",
    "revert_": "convert",
    "patch_aten": "patch",
    "info": "_info",  # not info.py: importing a submodule of that name would hide the function
    "summary": "_summary",
}

__all__ = [*_MODULES, *_NAMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cnnops")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    from . import ops as ops  # registers torch.ops.cnnops.*
