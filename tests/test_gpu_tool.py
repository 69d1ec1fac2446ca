"""tools/gpu.py without a device, and the tests' way to put their tensors on one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from cnnops._lib import C

ROOT = Path(__file__).resolve().parent.parent
SUITE = """
conv2d C=8 H=6 W=6 K=8 R=3 S=3 stride=1 pad=1
conv2d C=8 H=6 W=6 K=8 R=3 S=3 stride=1 pad=1 groups=8
max_pool2d C=8 H=6 W=6 kernel=2 stride=2
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    monkeypatch.setattr(sys, "path", list(sys.path))  # main() adds to it
    return module


def run(code: str, **environment: str) -> str:
    built = [ROOT] if Path(C.__file__).parent == ROOT / "cnnops" else []  # else cnnops is installed
    path = os.pathsep.join(str(p) for p in (*built, ROOT / "tests", ROOT / "tools"))
    environment = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", **environment}
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
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


@pytest.mark.skipif(not C.emulation, reason="this build has no emulated kernels")
def test_operators_take_emulated_kernels() -> None:
    code = """
from cnnops._lib import C
C.conv2d_forward = lambda *args, old=C.conv2d_forward, **kwargs: print(kwargs["kernel"]) or old(*args, **kwargs)
import conftest, torch
import cnnops.functional as CF
for k, groups in ((8, 1), (16, 16)):
    assert (CF.conv2d(torch.ones(1, 16, 5, 5), torch.ones(k, 16 // groups, 3, 3), groups=groups) == 144 // groups).all()
"""
    rows = [int(row) for row in run(code, CNNOPS_TEST_DEVICE="emulated").split()]
    names = {r["row"]: r["function"] for r in C.kernels() if (r["op"], r["isa"]) == ("conv2d", "cuda_emulated")}
    assert [names[row] for row in rows][-2:] == ["conv2d_mma_forward_f32", "conv2d_depthwise_forward_f32"]


def test_files_about_the_cpu_are_left_out_by_name() -> None:
    from conftest import OF_THE_CPU

    assert all((ROOT / "tests" / f"{name}.py").exists() for name in OF_THE_CPU)


def test_parts_that_cannot_be_done_say_why(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert tool.main(["sanitize"]) == 1
    assert "sanitize: left out: compute-sanitizer is not on PATH" in capfd.readouterr().out
    assert tool.main(["all"]) == 1
    assert capfd.readouterr().out.strip() == "build: left out: nvcc is not on PATH"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tool.main(["bench"]) == 1
    assert "bench: left out: PyTorch sees no CUDA device" in capfd.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "T4")
    assert tool.missing("test", "cuda") == "the kernels need compute capability 8.0, and T4 has 7.5"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(C, "cuda_build", lambda: None)
    assert "run the part `build`" in tool.missing("test", "cuda")
    monkeypatch.setitem(sys.modules, "cnnops._lib", None)
    assert "by the part `build`" in tool.missing("test", "cuda")


def test_a_part_that_fails_or_hangs_leaves_the_others(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    called = []

    def run(seconds: float, *command: str, **environment: str) -> int:
        called.append((command, environment))
        if "pytest" in command:
            raise OSError("no such program")
        return 124 if command[0] == "compute-sanitizer" else 0

    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert tool.main(["all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "build: ok (0 s); test: failed (0 s); sanitize: stopped (0 s); bench: ok (0 s)"
    commands = [command[:2] for command, _ in called]
    assert commands[:2] == [("cmake", "-S"), ("cmake", "--build")]
    assert [command[2] for command, _ in called if command[0] == "compute-sanitizer"] == list(tool.SANITIZERS)
    assert "-DCNNOPS_CUDA_CAPABILITIES=90a" in called[0][0]
    assert called[2][1] == {"CNNOPS_TEST_DEVICE": "cpu"}


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tool: ModuleType, tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"to = pathlib.Path({str(tmp_path / 'child')!r})\n"
        "try: to.write_text(str(child.pid)); time.sleep(60)\n"
        "except KeyboardInterrupt: to.write_text(to.read_text() + ' written')\n"
    )
    began = time.monotonic()
    assert tool.run(2.0, sys.executable, "-c", code) == 124
    assert time.monotonic() - began < 30
    child, word = (tmp_path / "child").read_text().split()
    assert word == "written"
    status, patience = Path("/proc", child, "status"), time.monotonic() + 10
    while status.exists() and "Z (zombie)" not in status.read_text():  # it has been told; dying takes a moment
        assert time.monotonic() < patience
        time.sleep(0.05)
    assert tool.run(30.0, sys.executable, "-c", "raise SystemExit(3)") == 3


def test_the_benchmark_and_its_table(tool: ModuleType, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    suite = tmp_path / "suite.txt"
    suite.write_text(SUITE)
    arguments = ["--device", "cpu", "--batch", "2", "--suite", str(suite), "--out", str(tmp_path)]
    assert tool.main(["bench", *arguments]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    table = [line[:-3] for line in lines if line and line[0] in ("float32", "bfloat16") and len(line) > 6]
    assert ["float32", "conv2d", "forward", "nchw", "1", "0"] in table
    assert ["float32", "conv2d,", "groups", "backward-weight", "channels_last", "1", "0"] in table
    assert ["bfloat16", "max_pool2d", "backward", "nchw", "1", "0"] in table
    assert len(json.loads((tmp_path / "bfloat16.json").read_text())["entries"]) == 16


@pytest.mark.slow
def test_a_stopped_benchmark_keeps_its_entries(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(tool, "BENCHES", {"float32": []})
    arguments = ["--device", "cpu", "--batch", "8", "--suite", "vgg16", "--limit", "bench=12", "--out", str(tmp_path)]
    assert tool.main(["bench", *arguments]) == 1
    out = capfd.readouterr().out
    assert "stopped before the last entry: float32" in out
    assert "bench: stopped" in out
    assert json.loads((tmp_path / "float32.json").read_text())["entries"]


@pytest.mark.skipif(not C.emulation, reason="this build has no emulated kernels")
def test_rows_go_by_turns(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    kept = [r for r in C.kernels() if r["isa"] == "cuda_emulated" and r["op"] == "avg_pool2d"]
    monkeypatch.setattr(C, "kernels", lambda: kept)
    assert tool.main(["rows", "--device", "cpu", "--limit", "rows=30"]) == 0
    assert f"of {len(kept)} rows, 0 wrong; of these rows none: []" in capfd.readouterr().out
    assert tool.main(["rows", "--device", "cpu", "--limit", "rows=0"]) == 1


def test_sanitizers_are_given_the_rows(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "under $2:" "$6" "$7" "$9"\n[ $2 != racecheck ]\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert tool.main(["sanitize", "--device", "cpu", "--limit", "sanitize=60"]) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("under")]
    assert lines == [f"under {t}: tools/gpu.py rows cpu" for t in tool.SANITIZERS]


def test_what_was_built_is_found_by_the_parts_that_follow(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cnnops").mkdir()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    seen = {}

    def missing(part: str, device: str) -> str:
        seen[part] = str(tmp_path) in sys.path
        return "" if part == "build" else "not now"

    monkeypatch.setattr(tool, "missing", missing)
    monkeypatch.setattr(tool, "build", lambda options: (tmp_path / "cnnops" / "_C.abi.so").touch() or 0)
    assert tool.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert seen == {"build": False, "test": True, "sanitize": True, "bench": True}


def test_the_suite_is_run_where_it_says(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no pytest-xdist, whose processes take long
    name = "tests/test_gpu_tool.py::test_files_about_the_cpu_are_left_out_by_name"
    assert tool.main(["test", "--device", "cpu", "--pytest", name, "--out", str(tmp_path)]) == 0
    assert "1 passed" in capfd.readouterr().out
    assert 'failures="0"' in (tmp_path / "tests.xml").read_text()
