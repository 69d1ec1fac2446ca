"""Where the tests' tensors are: on the CPU, or on the device that the environment's CNNOPS_TEST_DEVICE names (cuda).

With ``CNNOPS_TEST_DEVICE=emulated`` they are on the CPU, and operators' calls take the kernels that they would on a
CUDA device, emulated: all of the way to a device but the device. tests/test_conv2d.py takes four minutes then.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

PLACE = os.environ.get("CNNOPS_TEST_DEVICE", "cpu")
DEVICE = "cpu" if PLACE == "emulated" else PLACE
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


def set_up() -> None:
    if PLACE == "emulated":
        emulate()
    elif PLACE != "cpu":
        move_factories()


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


def emulate() -> None:
    """Makes the extension's functions choose among the emulated kernels, where nobody names one."""
    from cnnops._lib import C

    rows: dict[tuple[str, str, str], list[int]] = {}
    for row in C.kernels():
        if row["isa"] == "cuda_emulated":
            rows.setdefault((row["op"], row["pass"], f"torch.{row['dtype']}"), []).append(row["row"])
    assert rows, "this build has no emulated kernels (CMake option CNNOPS_EMULATION)"

    def emulated(op: str, pass_: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "kernel" in kwargs:
                return function(*args, **kwargs)
            wanted = pass_
            if (op, pass_) == ("batch_norm", "forward"):
                wanted = "training" if args[7] else "evaluation"
            # The first image says the dtype: vectors beside it may have another one.
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            like = next((t for t in tensors if t.dim() == 4), tensors[0])
            for row in rows[op, wanted, str(like.dtype)]:
                try:
                    return function(*args, **kwargs, kernel=row)
                except C.KernelNotApplicable:
                    continue
            raise AssertionError(f"no emulated kernel of {op} {wanted} takes this")

        return call

    for op, pass_ in {(op, "forward" if pass_ in ("training", "evaluation") else pass_) for op, pass_, _ in rows}:
        setattr(C, f"{op}_{pass_}", emulated(op, pass_, getattr(C, f"{op}_{pass_}")))
    for name in dir(C):
        if name.endswith("_direct"):  # which take calls on the CPU alone
            setattr(C, name, lambda *args, **kwargs: None)
