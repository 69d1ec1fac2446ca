"""One Markdown table from recorded runs: python benchmarks/summary.py benchmarks/results/RUN/*.json

A cell is the geometric mean of PyTorch's time over cnnops' in the same memory format, over distinct layers, and the
smallest of these ratios.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from typing import Any

KINDS = (
    "conv2d, dense", "conv2d, depthwise", "conv2d, groups of a few channels", "conv_transpose2d", "locally_connected2d",
    "max_pool2d", "avg_pool2d", "median_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "batch_norm", "batch_norm + relu", "batch_norm + add + relu", "batch_norm + silu",
)  # fmt: skip
PASSES = ("forward", "backward-input", "backward-weight", "backward")


def kind(entry: dict[str, Any]) -> str:
    values = dict(pair.split("=") for pair in entry["layer"].split()[1:])
    if entry["op"] == "batch_norm":
        return " + ".join(
            ["batch_norm"] + ["add"] * ("residual" in values) + [values[k] for k in ("activation",) if k in values]
        )
    if entry["op"] != "conv2d":
        return str(entry["op"])
    if values["groups"] == "1":
        return "conv2d, dense"
    return "conv2d, depthwise" if values["groups"] == values["C"] == values["K"] else "conv2d, groups of a few channels"


def cell(ratios: list[float]) -> str:
    return f"{math.exp(math.fsum(map(math.log, ratios)) / len(ratios)):.2f} ({min(ratios):.2f})" if ratios else ""


def main(files: list[str]) -> None:
    cells: defaultdict[Any, list[float]] = defaultdict(list)
    for file in files:
        with open(file) as f:
            run = json.load(f)
        where = run["environment"]
        for entry in run["entries"]:
            if entry["status"] != "ok":
                sys.exit(f"{file}: {entry['layer']} failed its check")
            row, column = (kind(entry), entry["pass"], entry["dtype"]), (entry["layout"], entry["batch"])
            cells[row, column].append(entry["ratio"])
    rows = sorted({row for row, _ in cells}, key=lambda r: (KINDS.index(r[0]), PASSES.index(r[1]), r[2]))
    columns = sorted({column for _, column in cells}, key=lambda c: (c[0] != "nchw", c[1]))
    print(f"{where['cpu']}, {where['threads']} threads, {where['isa']}; PyTorch {where['torch']}.\n")
    print("| op | pass | dtype | layers |", " | ".join(f"{layout}, batch {batch}" for layout, batch in columns), "|")
    print("|---|---|---|---:|" + "---:|" * len(columns))
    for row in rows:
        found = [cells[row, column] for column in columns]
        print("|", " | ".join((*row, str(max(map(len, found))), *map(cell, found))), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
