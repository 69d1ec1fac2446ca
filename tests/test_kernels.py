"""Every row of every kernel table, against the float64 oracles of ``references.py``."""

from __future__ import annotations

import pytest
import references
import torch
from place import PLACE
from references import PROBLEMS, OnDevice

from cnnops._lib import C

ROWS = C.kernels()


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['isa']}-{r['function']}")
def test_row_computes_what_the_oracle_says(row: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if not row["usable"]:
        pytest.skip(f"{row['isa']} cannot be used on this machine")
    if PLACE != "cpu" and row["isa"] not in (PLACE, f"cuda_{PLACE}"):
        pytest.skip(f"not for {PLACE}: a kernel for the CPU")
    if row["isa"] == "cuda":
        monkeypatch.setattr(references, "C", OnDevice(C))
    applicable = 0
    for problem in PROBLEMS[row["op"], row["pass"]]:
        try:
            problem(getattr(torch, row["dtype"]), row["row"]).verify()
            applicable += 1
        except C.KernelNotApplicable:
            continue
        except AssertionError as error:
            raise AssertionError(f"{getattr(problem, 'keywords', problem)}: {error}") from error
    assert applicable >= 3, "the row's kernel was given too few problems"
