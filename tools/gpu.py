"""What `make gpu` does on a machine with a CUDA device: `python tools/gpu.py [build|test|sanitize|bench|all]`.

Nothing is downloaded: the Python that runs this has torch with CUDA, pybind11, cmake, ninja, pytest, numpy, click and
rich, and nvcc is on PATH. The extension is built for the device at hand alone, into the source tree, where everything
below finds it. Each part has a time of its own (--limit), after which it is stopped and what it found until then is
kept; all together take less than 10 minutes.

  build     the extension with CUDA kernels
  test      the whole suite with its tensors on the device (CNNOPS_TEST_DEVICE); every row of the kernel tables there
  sanitize  compute-sanitizer's memcheck, racecheck and initcheck, each over as many problems of all rows as it can in
            its time, by turns
  bench     the layer suites against PyTorch with cuDNN (benchmark mode, both memory formats, with TF32 and without),
            JSON files, and a table, last
  rows      what the sanitizer runs

`--limit sanitize=600` gives a part more time. `--device cpu` is for trying this out: the suite and the benchmark on the
CPU, the rows emulated.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds of each part.
LIMITS = {"build": 200.0, "test": 130.0, "sanitize": 140.0, "bench": 115.0}
GRACE = 15.0  # seconds that a stopped command has to write what it has
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# What the bench runs, in both memory formats: name -> arguments.
BENCHES = {
    "float32": ["--dtype", "float32"],
    "tf32": ["--dtype", "float32", "--precision", "tf32", "--op", "conv2d"],
    "bfloat16": ["--dtype", "bfloat16"],
}


def paths() -> list[str]:
    """Where Python finds cnnops and the tests: in the source tree once it is built there, or else installed."""
    built = any((ROOT / "cnnops").glob("_C.*.so"))
    return [str(path) for path in ((ROOT, ROOT / "tests") if built else (ROOT / "tests",))]


def find_packages() -> None:
    """For this process. To be called again after a build."""
    sys.path[:0] = [path for path in paths() if path not in sys.path]
    importlib.invalidate_caches()


def run(seconds: float, *command: str, **environment: str) -> int:
    """The exit code; 124 where the command had to be stopped."""
    print("+", " ".join(command), flush=True)
    # Not the folder that it runs in: see paths().
    environment = {"PYTHONPATH": os.pathsep.join(paths()), "PYTHONSAFEPATH": "1", **environment}
    # A session of its own, to be stopped with what it started. A shell's background jobs ignore SIGINT.
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def missing(part: str, device: str) -> str:
    """Why this machine cannot do the part; empty where it can."""
    import torch

    if part == "sanitize" and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH"
    if part == "build" and shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if device != "cuda":
        return ""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name()} has {major}.{minor}"
    if part != "build":
        try:
            from cnnops._lib import C
        except ImportError as error:
            return f"{error} (here, by the part `build`)"
        if C.cuda_build() is None:
            return "this build has no CUDA kernels: run the part `build` first"
    return ""


def build(options: argparse.Namespace) -> int:
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability() if options.device == "cuda" else (9, 0)
    capability = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    folder = ROOT / "build" / "gpu"
    began = time.monotonic()
    return run(
        options.limit["build"],
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DSKBUILD_PROJECT_VERSION={version.split(chr(34))[1]}", "-DCNNOPS_CUDA=ON",
        f"-DCNNOPS_CUDA_CAPABILITIES={capability}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'cnnops'}",
    ) or run(options.limit["build"] + began - time.monotonic(), "cmake", "--build", str(folder))  # fmt: skip


def test(options: argparse.Namespace) -> int:
    several = []
    if importlib.util.find_spec("xdist") is not None:
        several = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    return run(
        options.limit["test"], sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "--maxfail=200", *several,
        f"--junitxml={options.out / 'tests.xml'}", *shlex.split(options.pytest), CNNOPS_TEST_DEVICE=options.device,
    )  # fmt: skip


def sanitize(options: argparse.Namespace) -> int:
    failed, end = 0, time.monotonic() + options.limit["sanitize"]
    for i, tool in enumerate(SANITIZERS):
        left = (end - time.monotonic()) / (len(SANITIZERS) - i)
        # Under a tool, torch takes long to start and each first launch, too: rows() begins to count after that.
        failed |= run(
            left, "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "tools/gpu.py", "rows",
            "--device", options.device, "--limit", f"rows={left / 2:.1f}", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
    return failed


def rows(options: argparse.Namespace) -> int:
    """A problem of each row, then another of each, until the time is over."""
    import references
    import torch

    from cnnops._lib import C

    isa = "cuda" if options.device == "cuda" else "cuda_emulated"
    if isa == "cuda":
        references.C = references.OnDevice(C)
    end = time.monotonic() + options.limit["rows"]
    left = {}
    for row in (r for r in C.kernels() if r["isa"] == isa):
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
    return int(wrong > 0 or not any(tried.values()))


def bench(options: argparse.Namespace) -> int:
    """Each run has its share of the time; a stopped one has written the entries that it came to."""
    options.out.mkdir(parents=True, exist_ok=True)
    failed, end = 0, time.monotonic() + options.limit["bench"]
    found: list[tuple[str, dict]] = []
    stopped = []
    names = [name for name in BENCHES if options.device == "cuda" or name != "tf32"]
    for i, name in enumerate(names):
        path = options.out / f"{name}.json"
        path.unlink(missing_ok=True)
        code = run(
            (end - time.monotonic()) / (len(names) - i), sys.executable, "-m", "cnnops", "bench",
            *(options.suite or ("resnet50", "mobilenet_v2")), "--device", options.device, "--batch", options.batch,
            "--min-time", "0.02", "--repeats", "5", "--json", str(path), *BENCHES[name],
        )  # fmt: skip
        if code == 124:
            stopped.append(name)
        failed |= code
        if path.exists():
            found.append((name, json.loads(path.read_text())))
    table(found)
    if stopped:
        print(f"stopped before the last entry: {', '.join(stopped)}")
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
            op = entry["op"]
            if op == "conv2d" and "groups=" in entry["layer"] and "groups=1 " not in entry["layer"] + " ":
                op = "conv2d, groups"
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


def limits(text: str) -> dict[str, float]:
    return {part: float(seconds) for part, seconds in (word.split("=") for word in text.split(","))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}
    parser.add_argument("part", nargs="?", default="all", choices=("all", *parts, "rows"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=limits, default={}, metavar="PART=SECONDS,...", help=f"default: {LIMITS}")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    parser.add_argument("--batch", default="32", help="of the benchmark")
    parser.add_argument(
        "--suite", action="append", help="of the benchmark; resnet50 and mobilenet_v2 where none is named"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="where results go")
    options = parser.parse_args(arguments)
    options.limit = {**LIMITS, "rows": 40.0, **options.limit}
    if options.part == "rows":
        find_packages()
        return rows(options)
    outcome = {}
    for name in parts if options.part == "all" else (options.part,):
        began = time.monotonic()
        find_packages()
        if reason := missing(name, options.device):
            outcome[name] = f"left out: {reason}"
        else:
            try:
                failed = parts[name](options)
            except Exception as error:  # the other parts are run
                print(f"{type(error).__name__}: {error}", flush=True)
                failed = 1
            word = {0: "ok", 124: "stopped"}.get(failed, "failed")
            outcome[name] = f"{word} ({time.monotonic() - began:.0f} s)"
        if name == "build" and not outcome[name].startswith("ok"):
            break
    print("\n" + "; ".join(f"{name}: {result}" for name, result in outcome.items()))
    return int(not all(result.startswith("ok") for result in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
