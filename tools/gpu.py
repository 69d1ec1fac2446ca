"""What `make gpu` does on a machine with a CUDA device: `python tools/gpu.py [build|test|sanitize|bench|all]`.

Nothing is downloaded: the Python that runs this has torch with CUDA, pybind11, cmake, ninja and pytest, and nvcc is on
PATH. The extension is built for the device at hand alone, into the source tree, where everything below finds it.

  build     the extension with CUDA kernels
  test      every row of the kernel tables on the device, and tests/test_cuda.py
  sanitize  compute-sanitizer's memcheck, racecheck and initcheck, each over as many problems of all rows as it can in
            --seconds, by turns
  bench     the layer suites against PyTorch with cuDNN, and the table below; JSON in out/gpu/
  rows      what the sanitizer runs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "gpu"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# What the bench runs, in both memory formats: (name, arguments).
BENCHES = (
    ("float32", ["--dtype", "float32"]),
    ("tf32", ["--dtype", "float32", "--precision", "tf32", "--op", "conv2d"]),
    ("bfloat16", ["--dtype", "bfloat16"]),
)


def run(*command: str, seconds: float | None = None, **environment: str) -> int:
    print("+", " ".join(command), flush=True)
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "tests"))
    try:
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, timeout=seconds
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 1


def build() -> int:
    import pybind11
    import torch

    if shutil.which("nvcc") is None:
        sys.exit("make gpu: nvcc is not on PATH")
    if not torch.cuda.is_available():
        sys.exit("make gpu: PyTorch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        sys.exit(
            f"make gpu: the kernels need compute capability 8.0, and {torch.cuda.get_device_name()} has {major}.{minor}"
        )
    architecture = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    folder = ROOT / "build" / "gpu"
    return run(
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DSKBUILD_PROJECT_VERSION={version.split(chr(34))[1]}", "-DCNNOPS_CUDA=ON",
        f"-DCNNOPS_CUDA_ARCHITECTURES={architecture}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'cnnops'}",
    ) or run("cmake", "--build", str(folder))  # fmt: skip


def test() -> int:
    # "cuda-" begins the names of the rows on the device.
    return run(sys.executable, "-m", "pytest", "-q", "tests/test_kernels.py", "-k", "cuda-") | run(
        sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"
    )


def sanitize(seconds: float) -> int:
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH: left out", flush=True)
        return 1
    failed = 0
    for tool in SANITIZERS:
        failed |= run(
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "tools/gpu.py", "rows",
            "--seconds", str(seconds), seconds=2 * seconds + 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    return failed


def rows(seconds: float) -> int:
    """A problem of each row, then another of each, until the time is over."""
    import references
    import torch

    from cnnops._lib import C

    references.C = references.OnDevice(C)
    end = time.monotonic() + seconds
    left = {}
    for row in (r for r in C.kernels() if r["isa"] == "cuda"):
        left[row["function"]] = (row, iter(references.PROBLEMS[row["op"], row["pass"]]))
    tried: dict[str, int] = dict.fromkeys(left, 0)
    wrong = 0
    while left and time.monotonic() < end:
        for name, (row, problems) in list(left.items()):
            for problem in problems:
                try:
                    problem(getattr(torch, row["dtype"]), row["row"]).verify()
                except C.KernelNotApplicable:
                    continue
                except AssertionError as error:
                    wrong += 1
                    print(f"wrong: {name} {getattr(problem, 'keywords', problem)}: {error}", flush=True)
                tried[name] += 1
                break
            else:
                del left[name]
            if time.monotonic() >= end:
                break
    none = [name for name, count in tried.items() if not count]
    print(f"{sum(tried.values())} problems of {len(tried)} rows, {wrong} wrong; of these rows none: {none}", flush=True)
    return int(wrong > 0 or bool(none))


def bench(batch: str, suites: list[str]) -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    failed = 0
    found: list[tuple[str, dict]] = []
    for name, arguments in BENCHES:
        path = OUT / f"{name}.json"
        path.unlink(missing_ok=True)
        failed |= run(
            sys.executable, "-m", "cnnops", "bench", *suites, "--device", "cuda", "--batch", batch, "--min-time",
            "0.02", "--repeats", "5", "--json", str(path), *arguments,
        )  # fmt: skip
        if path.exists():
            found.append((name, json.loads(path.read_text())))
    table(found)
    return failed


def table(found: list[tuple[str, dict]]) -> None:
    """Geometric means over the entries: ratio to PyTorch, percent of the copy bandwidth (tensors over 100 MB), and of
    the matrix product's rate."""
    if found:
        machine = found[0][1]["environment"]
        versions = f"torch {machine['torch']}, cuDNN {machine['cudnn']}"
        print(f"\n{machine['device']}, {versions}; copy {machine['copy_gbps']:.0f} GB/s")
    heads = ("", "op", "pass", "layout", "entries", "wrong", "ratio", "% copy", "% matrix")
    layout = "{:10} {:22} {:16} {:14} {:>7} {:>5} {:>6} {:>7} {:>8}"
    print(layout.format(*heads))
    for name, result in found:
        groups: dict[tuple[str, ...], list[dict]] = defaultdict(list)
        for entry in result["entries"]:
            op = "conv2d, groups" if entry["op"] == "conv2d" and "groups=" in entry["layer"] else entry["op"]
            groups[op, entry["pass"], entry["layout"]].append(entry)
        for key, entries in sorted(groups.items()):
            good = [e for e in entries if e["status"] == "ok"]
            means = (
                mean([e["ratio"] for e in good], ".2f"),
                mean([e["copy_percent"] for e in good if e["bytes"] > 1e8], ".0f"),
                mean([e["fma_percent"] for e in good if e.get("fma_percent")], ".0f"),
            )
            print(layout.format(name, *key, len(entries), len(entries) - len(good), *means))


def mean(values: list[float], format: str) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):{format}}" if values else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=("all", "build", "test", "sanitize", "bench", "rows"))
    parser.add_argument("--seconds", type=float, default=40, help="for each of the sanitizer's tools")
    parser.add_argument("--batch", default="32")
    parser.add_argument(
        "--suite", action="append", help="of the benchmark; resnet50 and mobilenet_v2 where none is named"
    )
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    suites = options.suite or ["resnet50", "mobilenet_v2"]
    parts = {
        "build": build,
        "test": test,
        "sanitize": lambda: sanitize(options.seconds),
        "bench": lambda: bench(options.batch, suites),
        "rows": lambda: rows(options.seconds),
    }
    if options.part != "all":
        return parts[options.part]()
    outcome = {}
    for name in ("build", "test", "sanitize", "bench"):
        began = time.monotonic()
        failed = parts[name]()
        outcome[name] = f"{'failed' if failed else 'ok'} ({time.monotonic() - began:.0f} s)"
        if failed and name == "build":
            break
    print("\n" + ", ".join(f"{name}: {result}" for name, result in outcome.items()))
    return int(any(result.startswith("failed") for result in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
