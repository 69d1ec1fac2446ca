"""Prints cnnops/_C.pyi, the type stub of the extension, from the signatures that pybind11 writes into docstrings."""

from __future__ import annotations

import inspect
import re

from cnnops._lib import C

HEADER = '''"""The extension's functions, written by `make stub`. Kernels fill the tensors they are given first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor | np.ndarray[Any, Any]

class KernelTypeError(TypeError): ...
'''

# Longest first: what one pattern leaves is for the next.
TYPES = (
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"typing\.Annotated\[(collections\.abc\.Sequence\[.*?\]), \"FixedSize\(\d+\)\"\]", r"\1"),
    (r"collections\.abc\.", ""),
    (r"torch\.Tensor", "Tensor"),
    (r"-> object$", "-> Any"),
    (r"-> list$", "-> list[dict[str, Any]]"),
    (r"-> dict$", "-> dict[str, Any]"),
    (r"-> tuple$", "-> tuple[Any, ...]"),
)


def signature(name: str) -> str:
    """The stub line of one function of the extension."""
    text = (getattr(C, name).__doc__ or "").split("\n", 1)[0]
    if not text.startswith(f"{name}("):
        raise SystemExit(f"cnnops._C.{name} has no signature in its docstring: overloads are not used here")
    for pattern, replacement in TYPES:
        text = re.sub(pattern, replacement, text)
    return f"def {text}: ..."


def functions() -> list[str]:
    return sorted(name for name in dir(C) if inspect.isbuiltin(getattr(C, name)))


def attributes() -> list[str]:
    kinds = {str: "str", list: "list[str]"}
    public = (name for name in vars(C) if name == "__version__" or not name.startswith("_"))
    return sorted(f"{name}: {kinds[type(getattr(C, name))]}" for name in public if type(getattr(C, name)) in kinds)


def stub() -> str:
    return HEADER + "\n" + "\n".join([*attributes(), "", *map(signature, functions())])


if __name__ == "__main__":
    print(stub())
