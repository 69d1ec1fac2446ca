"""Where the tests' tensors are: on the CPU, or on the device that the environment's CNNOPS_TEST_DEVICE names (cuda)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

DEVICE = os.environ.get("CNNOPS_TEST_DEVICE", "cpu")
_FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros",
)  # fmt: skip


def _is_moved(module: str) -> bool:
    """Tests and what they build from, and constructors of layers; not references.py, whose problems are on the CPU."""
    return module.startswith(("test_", "torch.nn.", "cnnops.nn")) or module in ("models", "opcheck_samples")


def _moved(function: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        if (
            not torch.compiler.is_compiling()
            and kwargs.get("device") is None
            and kwargs.get("out") is None
            and _is_moved(sys._getframe(1).f_globals.get("__name__", ""))
            and torch.get_default_device().type == "cpu"  # else a ``with torch.device(...)`` says where
        ):
            kwargs["device"] = DEVICE
        return function(*args, **kwargs)

    factory.__name__ = function.__name__
    return factory


def move_factories() -> None:
    """Makes DEVICE the one where tests' tensors are made. Not by ``torch.set_default_device``: that is a mode, beside
    which every call of cnnops takes the way through torch's dispatcher, and it would hide a device that cnnops itself
    forgets.
    """
    importlib.import_module("torch._decomp.decompositions_for_jvp")  # is scripted, with the factories that it finds
    for name in _FACTORIES:
        setattr(torch, name, _moved(getattr(torch, name)))
    # As on the CPU: PyTorch's own default rounds factors to TF32. Not by fp32_precision = "ieee", after which
    # torch.compile fails where it reads these.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
