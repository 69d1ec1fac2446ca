"""``cnnops bench`` and ``cnnops bench compare``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ..bench.suites import KEYS, SUITES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..bench.runner import Entry

PASSES = ("forward", "backward-input", "backward-weight", "backward", "all")
DTYPES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("nchw", "channels_last", "both")


class _Words(click.ParamType):
    """Words of a list, several with commas between them; whole numbers where there is no list."""

    name = "words"

    def __init__(self, choices: Sequence[str] | None = None) -> None:
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        words = tuple(word.strip() for word in value.split(","))
        if self.choices is None:
            if not all(word.isdecimal() and int(word) > 0 for word in words):
                self.fail(f"{value!r} is not positive whole numbers with commas between them", param, ctx)
            return tuple(int(word) for word in words)
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        return words

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "N,..." if self.choices is None else "NAME,..."


class _Bench(click.Group):
    """``cnnops bench resnet50`` is ``cnnops bench run resnet50``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


@click.group(cls=_Bench, short_help="Check and time the layers of well-known networks against PyTorch.")
def bench() -> None:
    """Check and time layers; `run` is what it does where no command is named."""


@bench.command(epilog="`cnnops bench compare OLD NEW` holds two JSON files against each other.")
@click.argument("suites", nargs=-1)
@click.option(
    "--filter", "filters", multiple=True, metavar="REGEX", help="Only layers whose line has this (repeatable)."
)
@click.option("--op", "ops", type=_Words(tuple(KEYS)), default=(), help=f"Only these: {', '.join(KEYS)}.")
@click.option(
    "--pass", "passes", type=_Words(PASSES), default="all", show_default=True,
    help="forward, backward-input or backward-weight (of convolutions), backward (every gradient), or all.",
)  # fmt: skip
@click.option("--dtype", "dtypes", type=_Words(DTYPES), default="float32", show_default=True, help=", ".join(DTYPES))
@click.option("--layout", type=click.Choice(LAYOUTS), default="both", show_default=True, help="Memory format.")
@click.option("--batch", "batches", type=_Words(), default="16", show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both sides.  [default: torch's choice]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True)
@click.option(
    "--precision", type=click.Choice(("ieee", "tf32")), default="ieee", show_default=True,
    help="What float32 convolutions on a CUDA device may be computed in, on both sides.",
)  # fmt: skip
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Calls before timing.")
@click.option("--repeats", type=click.IntRange(min=2), default=7, show_default=True, help="Rounds at least.")
@click.option(
    "--min-time", type=click.FloatRange(min=0), default=0.2, show_default=True, help="Seconds per entry at least."
)
@click.option(
    "--accuracy", is_flag=True, help="Measure errors against float64, cnnops' beside PyTorch's; time nothing."
)
@click.option(
    "--data", type=click.Choice(("normal", "offset", "positive", "wide")), default="normal", show_default=True,
    help="Inputs: normal; mean far from zero; all positive; magnitudes from 1e-30 to 1e30.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs, and of the part that is checked.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, writable=True), help="Write everything measured here."
)
@click.option("--list", "only_list", is_flag=True, help="List the entries, run nothing.")
def run(
    suites: tuple[str, ...], filters: tuple[str, ...], ops: tuple[str, ...], passes: tuple[str, ...],
    dtypes: tuple[str, ...], layout: str, batches: tuple[int, ...], threads: int | None, device: str, precision: str,
    warmup: int, repeats: int, min_time: float, accuracy: bool, data: str, seed: int, json_path: str | None,
    only_list: bool,
) -> None:  # fmt: skip
    """Check and time the layers of networks, in turn with PyTorch.

    SUITES: resnet50, vgg16, mobilenet_v2, efficientnet_b0, convnext_tiny, unet, and memory (layers that memory bounds);
    all of them where none is named; or text files in the same format. Every entry is first checked against float64; a
    wrong one is an error, is not timed, and makes the exit code 1. GB/s counts each tensor that must be read or written
    once (what training batch norm reads, twice); the percentages are of the FMA rate (on a CUDA device, of PyTorch's
    matrix product's rate) and the copy bandwidth measured in the same run.
    """
    if precision != "ieee" and device != "cuda":
        raise click.UsageError(f"--precision {precision} is for --device cuda")
    if accuracy and "float64" in dtypes:
        raise click.UsageError("--accuracy --dtype float64: errors are measured against float64 itself")
    import torch

    from ..bench import report, runner
    from ._console import console

    if device == "cuda":
        _use_cuda(precision)
    if threads is not None:
        torch.set_num_threads(threads)
    layouts = ("nchw", "channels_last") if layout == "both" else (layout,)
    entries = runner.select(suites or SUITES, filters, ops, passes, dtypes, layouts, batches)
    if not entries:
        raise click.UsageError("no layer matches these options")
    if only_list:
        for entry in entries:
            click.echo(" ".join(str(value) for value in entry.key().values()))
        return
    options = runner.Options(warmup, repeats, min_time, accuracy, data, seed, device, precision)
    machine = runner.environment(entries, device, precision)
    out = console()
    out.print(report.heading(machine))
    for warning in machine["warnings"]:
        out.print(f"[bold red]warning[/bold red] {warning}")
    results: list[dict[str, Any]] = []
    interrupted = False
    try:
        for result in _with_bar(runner.run(entries, options, machine), entries):
            results.append(result)
    except KeyboardInterrupt:  # what was measured is still shown and written
        interrupted = True
    for table in report.tables(results, accuracy):
        out.print(table)
    if json_path is not None:
        _write(json_path, machine, vars(options), results, report.summarize(results))
    if interrupted:
        raise click.Abort
    if any(result["status"] != "ok" for result in results):
        raise SystemExit(1)


def _use_cuda(precision: str) -> None:
    import torch

    from .._lib import C

    if C.cuda_build() is None:
        raise click.UsageError("--device cuda: this build has no CUDA kernels")
    if not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch sees no CUDA device")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def _with_bar(results: Iterator[dict[str, Any]], entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """The results, with a progress bar where stderr is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ._console import console

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    err = console(stderr=True)
    with Progress(*columns, console=err, transient=True, refresh_per_second=4, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=len(entries))
        for done, entry in enumerate(entries):
            bar.update(task, description=f"{entry.suite} {entry.layer.op} {entry.pass_}", completed=done)
            yield next(results)


def _write(path: str, machine: Any, settings: Any, results: Any, summary: Any) -> None:
    found = {"format": 1, "environment": machine, "options": settings, "summary": summary, "entries": results}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.write("\n")


@bench.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False))
@click.argument("new", type=click.Path(exists=True, dir_okay=False))
@click.option("--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True, help="Relative change.")
def compare(old: str, new: str, threshold: float) -> None:
    """Hold two files of `cnnops bench --json` against each other.

    The exit code is 1 where the ratio to PyTorch of any entry fell by more than the threshold, or a result became
    wrong.
    """
    from ..bench.compare import compare as compare_results
    from ..bench.compare import read, tables
    from ._console import console

    before, after = read(old), read(new)
    rows = compare_results(before, after, threshold)
    out = console()
    for table in tables(rows, before, after, threshold):
        out.print(table)
    if any(row["verdict"] == "regression" for row in rows):
        raise SystemExit(1)
