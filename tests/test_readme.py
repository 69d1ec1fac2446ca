"""What README.md shows runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cnnops
import cnnops.functional as CF

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
CALLS = re.findall(r"`(CF\..*?)`", README)


def test_the_python_blocks_run() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS, names)
    assert names["y"].shape == (8, 16, 32, 32)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_the_functions_table_runs(call: str) -> None:
    y = eval(call, {"CF": CF, "torch": torch, "x": torch.randn(8, 3, 32, 32), "w": torch.randn(16, 3, 3, 3)})
    assert y.shape[0] == 8


def test_every_function_has_a_row() -> None:
    assert {re.match(r"CF\.(\w+)", call)[1] for call in CALLS} == set(CF.__all__)


def test_the_rules_of_sizes_hold() -> None:
    """The formulas under "Output sizes, receptive fields, parameter counts"."""
    h, r, s, d, p = 32, 5, 3, 2, 1
    layer = torch.nn.Conv2d(4, 6, r, stride=s, dilation=d, padding=p, groups=2)
    size = (h + 2 * p - d * (r - 1) - 1) // s + 1
    summary = cnnops.summary(torch.nn.Sequential(layer, torch.nn.MaxPool2d(3)), (4, h, h))
    assert summary.rows[0].output == (1, 6, size, size)
    assert summary.rows[0].parameters == 6 * (4 * r * r // 2 + 1)
    assert summary.rows[0].receptive_field == (1 + d * (r - 1),) * 2
    assert summary.rows[1].receptive_field == (1 + d * (r - 1) + 2 * s,) * 2
    local = cnnops.nn.LocallyConnected2d(3, 8, input_size=9, kernel_size=3)
    assert sum(t.numel() for t in local.parameters()) == 7 * 7 * 8 * (3 * 3 * 3 + 1)
    assert sum(t.numel() for t in torch.nn.BatchNorm2d(5).parameters()) == 2 * 5
