"""Loads the compiled extension, after torch, so that both share one OpenMP runtime."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

import torch  # noqa: F401  (first: its libgomp.so.1 must be the one that the extension finds)

from . import config


def _load() -> ModuleType:
    if importlib.util.find_spec("cnnops._C") is None:
        raise ImportError(
            "cnnops: the compiled extension cnnops._C is missing: this looks like a source tree that was never built. "
            "Run `pip install .` in it, and import cnnops from outside of it."
        )
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"cnnops: the compiled extension is there but cannot be loaded: {error}") from error
    _C.set_isa_limit(config.isa_limit())
    return _C


if TYPE_CHECKING:
    from . import _C as C
else:
    C = _load()
