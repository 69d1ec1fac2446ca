"""Fixtures of all tests. Random inputs come from a generator whose seed is printed with a failure."""

from __future__ import annotations

import os

import pytest
import torch

SEED = int(os.environ.get("CNNOPS_TEST_SEED", "20260"))


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(SEED)
    return SEED


def pytest_report_header() -> str:
    return f"cnnops: torch {torch.__version__}, seed {SEED} (CNNOPS_TEST_SEED), {torch.get_num_threads()} threads"
