"""Goes through the entries: builds, checks, then times or measures errors."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._info import info
from . import suites
from .cases import DTYPES, Case, build, passes
from .check import verify
from .suites import Layer
from .timing import copy_bandwidth, fma_peak, in_turn, matrix_peak

BACKWARD = ("backward", "backward-input", "backward-weight")


@dataclass(frozen=True)
class Entry:
    """What is timed: a layer, a pass, a dtype, a layout, a batch size."""

    suite: str
    layer: Layer
    pass_: str
    dtype: str
    layout: str
    batch: int

    def key(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "layer": self.layer.text,
            "op": self.layer.op,
            "count": self.layer.count,
            "pass": self.pass_,
            "dtype": self.dtype,
            "layout": self.layout,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Options:
    """How to run the entries."""

    warmup: int = 2
    repeats: int = 7
    min_time: float = 0.2
    accuracy: bool = False
    data: str = "normal"
    seed: int = 0
    device: str = "cpu"
    precision: str = "ieee"


def select(
    names: Sequence[str],
    filters: Sequence[str],
    ops: Sequence[str],
    wanted_passes: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    batches: Sequence[int],
) -> list[Entry]:
    """The entries that the options name. The pass "backward" stands for every gradient, "all" for everything."""
    entries = []
    for suite in names:
        for layer in suites.load(suite):
            if (ops and layer.op not in ops) or not suites.matches(layer, filters):
                continue
            for pass_ in passes(layer):
                if not {pass_, "all", *(("backward",) if pass_ in BACKWARD else ())} & set(wanted_passes):
                    continue
                for dtype in dtypes:
                    for layout in layouts:
                        entries += [Entry(suite, layer, pass_, dtype, layout, batch) for batch in batches]
    return entries


def environment(entries: Iterable[Entry], device: str = "cpu", precision: str = "ieee") -> dict[str, Any]:
    """The machine and the versions, and its peaks measured now. On a CUDA device ``fma_gflops`` is the matrix product's
    rate, float32's in the precision that is set."""
    threads = torch.get_num_threads()
    dtypes = list(dict.fromkeys(e.dtype for e in entries))
    if device == "cuda":
        peaks = {d: matrix_peak(DTYPES[d]) / 1e9 for d in dtypes}
        bandwidth = copy_bandwidth(1 << 30, "cuda")
    else:
        peaks = {d: fma_peak(DTYPES[d], threads) / 1e9 for d in dtypes}
        bandwidth = copy_bandwidth()
    found = info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cnnops": found["version"],
        "compiler": found["build"]["compiler"],
        "torch": found["torch"]["version"],
        "torch_cpu_capability": found["torch"]["cpu_capability"],
        "python": platform.python_version(),
        "system": platform.system() + " " + platform.release(),
        "cpu": found["cpu"]["model"],
        "cores": found["cpu"]["cores"],
        "isa": found["cpu"]["isa"],
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": precision,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "warnings": found["warnings"],
        "fma_gflops": peaks,
        "copy_gbps": bandwidth / 1e9,
    }


def run(entries: Sequence[Entry], options: Options, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One result per entry, as it will stand in the JSON. ``status`` is ok, wrong (never timed) or error."""
    for entry in entries:
        result: dict[str, Any] = {**entry.key(), "status": "ok", "message": ""}
        try:
            case = build(
                entry.layer, entry.pass_, DTYPES[entry.dtype], entry.layout, entry.batch, options.data, options.seed,
                options.device,
            )  # fmt: skip
            verdict = verify(case.parts(_call(case.ours)), _eps(options))
        except Exception as error:
            result.update(status="error", message=f"{type(error).__name__}: {error}".splitlines()[0])
            yield result
            continue
        result["check"] = {"rms": verdict.rms, "worst": verdict.worst}
        if verdict.wrong:
            result.update(status="wrong", message=verdict.wrong)
        elif options.accuracy:
            result.update(_errors(case, verdict.rms, verdict.worst))
        else:
            result.update(_times(case, entry, options, machine))
        del case
        yield result


def _eps(options: Options) -> float:
    """Of float32 arithmetic: TF32 keeps 10 bits of a factor."""
    return 2.0**-10 if options.precision == "tf32" else torch.finfo(torch.float32).eps


def _call(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()


def _errors(case: Case, rms: float, worst: float) -> dict[str, Any]:
    theirs = verify(case.parts(_call(case.theirs)))
    ratio = rms / theirs.rms if theirs.rms else (1.0 if rms == 0 else float("inf"))
    return {"pytorch_check": {"rms": theirs.rms, "worst": theirs.worst}, "error_ratio": ratio}


def _times(case: Case, entry: Entry, options: Options, machine: dict[str, Any]) -> dict[str, Any]:
    finish: tuple[Callable[[], Any], ...] = (torch.cuda.synchronize,) if options.device == "cuda" else ()
    # cuDNN looks for its fastest kernel in PyTorch's first call; not in those of the check, each of another shape.
    torch.backends.cudnn.benchmark = True
    try:
        with torch.no_grad():
            ours, theirs, ratio = in_turn(
                case.ours, case.theirs, options.warmup, options.repeats, options.min_time, *finish
            )
    finally:
        torch.backends.cudnn.benchmark = False
    gbps = case.bytes / ours.median / 1e9
    found: dict[str, Any] = {
        "ours": ours.to_dict(),
        "pytorch": theirs.to_dict(),
        "ratio": ratio,
        "bytes": case.bytes,
        "flops": case.flops,
        "gbps": gbps,
        "copy_percent": 100 * gbps / machine["copy_gbps"],
    }
    if case.flops is not None:
        found["gflops"] = case.flops / ours.median / 1e9
        found["fma_percent"] = 100 * found["gflops"] / machine["fma_gflops"][entry.dtype]
    return found
