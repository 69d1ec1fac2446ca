"""The CUDA sources compile for the architectures that are tuned for, and their kernels keep to their registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
CAPABILITIES = ("80", "89", "90a")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


def messages(source: Path, folder: Path) -> str:
    """What nvcc and ptxas say of a source: from a build with CNNOPS_EMULATION, if it is of the sources as they are."""
    newest = max(p.stat().st_mtime for p in (REPOSITORY / "csrc").rglob("*.*") if p.suffix in (".cu", ".cuh", ".h"))
    for kept in (REPOSITORY / "build").glob(f"**/cnnops_cuda.dir/**/{source.name}.o.txt"):
        text = kept.read_text()
        if kept.stat().st_mtime > newest and all(f"'sm_{c}'" in text for c in CAPABILITIES):
            return text
    targets = ["-gencode=arch=compute_80,code=[sm_80,sm_89]", "-gencode=arch=compute_90a,code=sm_90a"]
    run = subprocess.run(
        ["nvcc", "-std=c++20", "-O3", "--threads", "2", "-Xptxas", "-v", *targets, "-DCNNOPS_DEVICE_SOURCE=1",
         "-DCNNOPS_ISA=cuda", '-DCNNOPS_CUDA_CAPABILITIES="test"', "-I", REPOSITORY / "csrc", "-c", source,
         "-o", folder / "kernels.o"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    said = messages(source, tmp_path)
    assert "warning" not in said, said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if source.stem != "runtime":
        assert len(spills) >= 3 * len(CAPABILITIES), "ptxas did not report the kernels"
    kernels = re.findall(r"Function properties for (\S+)", said)
    # float64 has to be right; its kernels may spill.
    wrong = [k for k, s in zip(kernels, spills, strict=True) if s != ("0", "0") and "kernelId" not in k]
    assert wrong == [], f"registers spill to memory in {wrong}"
