"""Every example in the public docstrings runs and prints what it says; every public name has one."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch

import cnnops
from cnnops import convert, functional, nn, patch

PUBLIC: dict[str, Any] = {
    **{f"functional.{name}": getattr(functional, name) for name in functional.__all__},
    **{f"nn.{name}": getattr(nn, name) for name in nn.__all__},
    "convert_": convert.convert_,
    "revert_": convert.revert_,
    "Report": convert.Report,
    "patch_aten": patch.patch_aten,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    names = {function: getattr(functional, function) for function in functional.__all__}
    names |= {"torch": torch, "cnnops": cnnops, "nn": nn}
    text = inspect.getdoc(PUBLIC[name])
    assert text
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples, "no example"
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.startswith(("functional.", "nn."))])
def test_arguments_are_described(name: str) -> None:
    target = PUBLIC[name]
    text = inspect.getdoc(target) or ""
    arguments = list(inspect.signature(target).parameters)
    missing = [a for a in arguments if a not in ("self", "args", "kwargs", "format") and a not in text]
    assert not missing, f"{name} does not say what {missing} are"
    for word in ("Shape:" if name.startswith("nn.") else "Returns:", "Raises:", "Example:"):
        assert word in text, f"{name} has no '{word}'"
