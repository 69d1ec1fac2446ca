"""Page faults and memory of a training step: python benchmarks/memory.py resnet50 --batch 8

PyTorch's and cnnops' (after ``cnnops.convert_``) in a process each, both memory formats: faults of a step after some
that warm up, and the most memory that was resident. Needs torchvision, and pillow, which it imports.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
from pathlib import Path

import click


def measure(name: str, layout: str, ours: bool, batch: int, steps: int) -> dict[str, float]:
    import torch
    from models import training
    from torchvision_cpu import torchvision

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().to(memory_format=memory_format)
    if ours:
        import cnnops

        cnnops.convert_(model)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=memory_format)
    step = training(model, x, torch.randint(0, 1000, (batch,)))
    for _ in range(3):
        step()
    faults = []
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF)
        step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults.append(after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt)
    return {"faults": statistics.median(faults), "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--batch", default=8)
@click.option("--steps", default=5, help="After three to warm up.")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], batch: int, steps: int, file: Path | None) -> None:
    print("| model | memory format | page faults a step: PyTorch | cnnops | peak memory MB: PyTorch | cnnops | ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    entries = []
    for name in names:
        for layout in ("nchw", "channels_last"):
            found = []
            for ours in (False, True):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found.append(pool.apply(measure, (name, layout, ours, batch, steps)))
            theirs, mine = found
            entries.append(dict(model=name, batch=batch, layout=layout, pytorch=theirs, cnnops=mine))
            faults = [f"{side['faults']:,.0f}" for side in found]
            peaks = [f"{side['peak_rss'] / 1e6:,.0f}" for side in found]
            ratio = f"{mine['peak_rss'] / theirs['peak_rss']:.2f}"
            print("|", " | ".join((name, layout, *faults, *peaks, ratio)), "|", flush=True)
    if file:
        file.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
