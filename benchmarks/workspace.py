"""The memory that convolutions work in: python benchmarks/workspace.py --json FILE

For every dense convolution of the suites, batch 1 and 16, both memory formats, each pass in a process of its own: the
most memory that was in use beside input, weights and result, over the size of these three. Blocks under 64 KiB are not
counted.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import click
import torch

import cnnops
from cnnops import functional
from cnnops.bench import suites
from cnnops.ops._core import POOLED_BYTES
from cnnops.ops.conv2d import gradients

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "backward-input", "backward-weight")


def measure(line: str, batch: int, layout: str, pass_: str, dtype: torch.dtype) -> dict[str, Any]:
    layer, format = suites.parse_line(line), FORMATS[layout]
    c, h, w, k, r, s = (layer[key] for key in "CHWKRS")

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype).contiguous(memory_format=format)

    x, weight, dy = ones(batch, c, h, w), ones(k, c, r, s), ones(batch, k, *layer.output)
    geometry = (layer.pair("stride"), layer.pair("pad"), layer.pair("dilation"))
    before = cnnops.memory.stats()["in_use"]
    with torch.no_grad():
        if pass_ == "forward":
            result = functional.conv2d(x, weight, None, *geometry)
        else:
            wanted = (pass_ == "backward-input", pass_ == "backward-weight", False)
            result = next(g for g in gradients(dy, x, weight, *geometry, 1, wanted) if g is not None)
    size = result.numel() * result.element_size()
    beside = cnnops.memory.stats()["peak_in_use"] - before - (size if size >= POOLED_BYTES else 0)
    sizes = sum(t.numel() * t.element_size() for t in (x, weight, dy))
    return dict(
        layer=layer.text, batch=batch, layout=layout, **{"pass": pass_}, bytes=max(0, beside), ratio=beside / sizes
    )


@click.command()
@click.option("--dtype", default="float32")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(dtype: str, file: Path | None) -> None:
    layers = {
        layer.line(): None
        for name in suites.SUITES
        for layer in suites.load(name)
        if layer.op == "conv2d" and layer["groups"] == 1
    }
    cases = [
        (line, batch, layout, pass_, getattr(torch, dtype))
        for line in layers
        for batch in (1, 16)
        for layout in FORMATS
        for pass_ in PASSES
    ]
    # A fresh process each: the peak is never taken back. Forked, or torch would be loaded a thousand times.
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        found = pool.starmap(measure, cases, chunksize=1)
    found.sort(key=lambda e: -e["ratio"])
    over = [e for e in found if e["ratio"] > 1.5]
    print(
        f"{len(found)} calls, median {statistics.median(e['ratio'] for e in found):.2f}, above 1.5: {len(over)}, "
        f"{sum(e['bytes'] > 1 << 20 for e in over)} of them with more than 1 MB\n"
    )
    print("| layer | batch | memory format | pass | workspace MB | over input, weights and result |")
    print("|---|---:|---|---|---:|---:|")
    for e in [e for e in over if e["bytes"] > 1 << 20][:20]:
        print(
            f"| {e['layer']} | {e['batch']} | {e['layout']} | {e['pass']} | {e['bytes'] / 1e6:.1f} | {e['ratio']:.2f} |"
        )
    if file:
        file.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
