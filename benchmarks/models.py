"""Whole models, PyTorch's beside the same after ``cnnops.convert_``: python benchmarks/models.py resnet50 --batch 8

Training steps (cross entropy, SGD) and inference in float32, in turn in one process, both memory formats. Needs
torchvision, and pillow, which it imports.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torchvision_cpu import torchvision

import cnnops
from cnnops._lib import C


def training(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def inference(model: torch.nn.Module, x: torch.Tensor, _: torch.Tensor) -> Callable[[], None]:
    model.eval()

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    return infer


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--batch", default=8)
@click.option("--rounds", default=5, help="After one to warm up.")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], batch: int, rounds: int, file: Path | None) -> None:
    print("| model | memory format | | PyTorch ms | cnnops ms | ratio |\n|---|---|---|---:|---:|---:|")
    entries = []
    for name in names:
        for layout, memory_format in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
            torch.manual_seed(0)
            theirs = getattr(torchvision.models, name)().to(memory_format=memory_format)
            ours = copy.deepcopy(theirs)
            cnnops.convert_(ours)
            x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=memory_format)
            target = torch.randint(0, 1000, (batch,))
            for what in (training, inference):
                runs = [what(model, x, target) for model in (theirs, ours)]
                times = [[seconds(run) for run in runs] for _ in range(rounds + 1)][1:]
                a, b = (statistics.median(each) for each in zip(*times, strict=True))
                entries.append(
                    dict(model=name, batch=batch, layout=layout, what=what.__name__, pytorch=a, ours=b, ratio=a / b)
                )
                print(
                    f"| {name} | {layout} | {what.__name__} | {a * 1e3:.0f} | {b * 1e3:.0f} | {a / b:.2f} |", flush=True
                )
    if file:
        where = dict(
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
            cnnops=C.__version__,
            isa=C.isa_limit(),
        )
        file.write_text(json.dumps(dict(environment=where, entries=entries), indent=1) + "\n")


if __name__ == "__main__":
    main()
