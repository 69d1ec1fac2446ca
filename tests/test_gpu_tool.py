"""tools/gpu.py without a device, and the tests' way to put their tensors on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")))
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return found.stdout


def test_tensors_of_tests_and_parameters_of_layers_are_on_the_device() -> None:
    code = """
import conftest, torch
def made():
    return [t.device.type for t in (torch.ones(2), torch.tensor([1.0]), torch.ones(2, device="cpu"),
                                    torch.nn.Conv2d(1, 1, 1).weight, torch.nn.BatchNorm2d(3).running_mean)]
print(*made())
__name__ = "test_something"
print(*made(), torch._C._len_torch_function_stack())
"""
    here, there = run(code, CNNOPS_TEST_DEVICE="meta").splitlines()
    assert here == "cpu cpu cpu meta meta"
    assert there == "meta meta cpu meta meta 0"


def test_files_about_the_cpu_are_left_out_by_name() -> None:
    from conftest import OF_THE_CPU

    assert all((ROOT / "tests" / f"{name}.py").exists() for name in OF_THE_CPU)
