"""Fixtures of all tests. Random inputs come from a generator whose seed is printed with a failure."""

from __future__ import annotations

import os

import pytest
import torch
from place import PLACE, set_up

SEED = int(os.environ.get("CNNOPS_TEST_SEED", "20260"))

# What tests of these files are about, where it is nothing of a device.
OF_THE_CPU = {
    "test_cli": "commands, and the benchmark on the CPU",
    "test_conv2d_pairs": "kernels for the CPU",
    "test_conv2d_winograd": "kernels for the CPU",
    "test_cuda_build": "sources, compiled for several devices",
    "test_cuda_emulated": "kernels emulated on the CPU",
    "test_docstrings": "examples with tensors on the CPU",
    "test_emulation": "the emulator",
    "test_examples": "trainings on the CPU",
    "test_gpu_tool": "tools/gpu.py",
    "test_memory": "the pool of host memory",
    "test_package": "the package, and instruction sets",
    "test_readme": "examples with tensors on the CPU",
}

set_up()


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(SEED)
    return SEED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if PLACE != "cpu" else ():
        if (reason := OF_THE_CPU.get(item.path.stem)) is not None:
            item.add_marker(pytest.mark.skip(reason=f"not for {PLACE}: {reason}"))


def pytest_report_header() -> str:
    threads = torch.get_num_threads()
    return f"cnnops: torch {torch.__version__}, on {PLACE}, seed {SEED} (CNNOPS_TEST_SEED), {threads} threads"
