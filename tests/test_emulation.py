"""The emulator of CUDA devices finds what it is there to find."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent


def flags() -> list[str]:
    text = (REPOSITORY / "cmake" / "cnnops.cmake").read_text()
    found = re.search(r"set\(CNNOPS_EMULATION_FLAGS (.*?) \$", text)
    gcc = re.search(r"list\(APPEND CNNOPS_EMULATION_FLAGS (.*)\)", text)
    assert found is not None
    assert gcc is not None
    return [*found[1].split(), *gcc[1].split()]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("emulation")
    include = ["-std=gnu++20", "-I", str(REPOSITORY / "csrc")]
    sources = (REPOSITORY / "tests" / "emulation" / "programs.cu", REPOSITORY / "csrc/cuda/emulation/emulator.cpp")
    kernels = ["-DCNNOPS_DEVICE_SOURCE=1", "-DCNNOPS_EMULATED=1", "-DCNNOPS_ISA=cuda_emulated", *flags()]
    for source, options in zip(sources, (kernels, ["-O2"]), strict=True):
        subprocess.run(
            ["g++", "-x", "c++", *include, *options, "-w", "-c", source, "-o", folder / f"{source.stem}.o"], check=True
        )
    binary = folder / "programs"
    subprocess.run(["g++", folder / "programs.o", folder / "emulator.o", "-o", binary], check=True)

    def run(name: str) -> str:
        return subprocess.run([binary, name], capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    return run


def weighted(values: torch.Tensor) -> float:
    return float((values.double().flatten() * (torch.arange(64) % 7 + 1)).sum())


X = torch.arange(64.0)
A, B = X[:16, None] + X[None, :16], X[:16, None] - X[None, :8]


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("copy", X),
        ("reversed_by_shared_memory", X.flip(0)),
        ("within_a_warp", X.view(32, 2).flip(1)),
        ("sums", X.view(2, 32).mean(1, keepdim=True).expand(2, 32)),
        ("waits_for_its_copies", X),
        ("multiplies", (A @ B)[:8]),
        ("divides", torch.ones(64)),
    ],
)
def test_a_right_program_gives_its_result(program: Callable[[str], str], name: str, result: torch.Tensor) -> None:
    assert float(program(name)) == weighted(result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_past_the_end", "thread 63 of block 0, 0, 0: reads outside of every tensor"),
        ("writes_before_the_begin", "thread 0 of block 0, 0, 0: writes outside of every tensor"),
        ("misaligned", "a misaligned access"),
        ("forgets_the_barrier", "nobody has written"),
        ("forgets_the_second_barrier", "a race: (writes|reads) shared memory another is (writing|reading)"),
        ("beyond_the_warp", "nobody has written|a race: reads shared memory another is writing"),
        ("reads_what_nobody_wrote", "reads shared memory that nobody has written"),
        ("leaves_shared_memory", "outside of every tensor|past the end of shared memory"),
        ("waits_for_different_things", "threads of a block wait for different things"),
        ("shares_copies_without_a_barrier", "a race: reads shared memory another is writing|nobody has written"),
        ("ends_before_its_copies", "cp.async copies that it did not wait for"),
    ],
)
def test_a_fault_is_found(program: Callable[[str], str], name: str, message: str) -> None:
    assert re.search(message, program(name)), program(name)


def test_a_copy_is_not_there_before_it_is_waited_for(program: Callable[[str], str]) -> None:
    assert program("waits_for_too_few_copies").endswith("nan")
