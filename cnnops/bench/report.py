"""Tables of results, and their summaries. Nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = dict[str, Any]
GROUP = ("suite", "op", "pass", "dtype", "layout", "batch")
# Columns that move to the title where all entries agree.
VARYING = ("suite", "pass", "dtype", "layout", "batch")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values if v > 0]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summarize(results: Sequence[Result]) -> list[Result]:
    """One row per suite, op, pass, dtype, layout and batch: the geometric mean of the ratios to PyTorch, one vote per
    distinct layer, and the total times, each layer as often as it occurs in the network."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in GROUP), []).append(result)
    rows = []
    for key, members in groups.items():
        row: Result = {**dict(zip(GROUP, key, strict=True)), "entries": len(members)}
        row["failed"] = sum(m["status"] != "ok" for m in members)
        timed = [m for m in members if "ratio" in m]
        if timed:
            ours, theirs = (sum(m["count"] * m[side]["median"] for m in timed) for side in ("ours", "pytorch"))
            row.update(
                geomean=geometric_mean(m["ratio"] for m in timed),
                worst=min(m["ratio"] for m in timed),
                total_ours=ours,
                total_pytorch=theirs,
                total_ratio=theirs / ours,
            )
        compared = [m for m in members if "error_ratio" in m]
        if compared:
            row.update(
                error_geomean=geometric_mean(m["error_ratio"] for m in compared),
                error_worst=max(m["error_ratio"] for m in compared),
                element_worst=max(m["check"]["worst"] for m in compared),
                pytorch_element_worst=max(m["pytorch_check"]["worst"] for m in compared),
            )
        rows.append(row)
    return rows


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value) or abs(value) >= 1e7:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def _small(value: float) -> str:
    return f"{value:.2e}"


def _ratio(value: float, good: bool) -> str:
    return f"[green]{value:.2f}[/green]" if good else f"[red]{value:.2f}[/red]"


def _milliseconds(times: dict[str, float]) -> str:
    return f"{_number(times['median'] * 1e3)} ±{100 * times['spread'] / 2:.0f}%"


TIMES: list[tuple[str, Callable[[Result], str]]] = [
    ("ours ms", lambda r: _milliseconds(r["ours"])),
    ("PyTorch ms", lambda r: _milliseconds(r["pytorch"])),
    ("GFLOP/s", lambda r: _number(r.get("gflops"))),
    ("% FMA", lambda r: _number(r.get("fma_percent"))),
    ("GB/s", lambda r: _number(r["gbps"])),
    ("% copy", lambda r: _number(r["copy_percent"])),
    ("ratio", lambda r: _ratio(r["ratio"], r["ratio"] >= 1)),
]
ERRORS: list[tuple[str, Callable[[Result], str]]] = [
    ("error", lambda r: _small(r["check"]["rms"])),
    ("PyTorch's", lambda r: _small(r["pytorch_check"]["rms"])),
    ("ratio", lambda r: _ratio(r["error_ratio"], r["error_ratio"] <= 1)),
    ("worst element", lambda r: _number(r["check"]["worst"])),
    ("PyTorch's", lambda r: _number(r["pytorch_check"]["worst"])),
]
TIME_TOTALS: list[tuple[str, Callable[[Result], str]]] = [
    ("geometric mean", lambda r: _ratio(r["geomean"], r["geomean"] >= 1)),
    ("worst", lambda r: _ratio(r["worst"], r["worst"] >= 1)),
    ("total ours ms", lambda r: _number(r["total_ours"] * 1e3)),
    ("PyTorch ms", lambda r: _number(r["total_pytorch"] * 1e3)),
    ("ratio of totals", lambda r: _ratio(r["total_ratio"], r["total_ratio"] >= 1)),
]
ERROR_TOTALS: list[tuple[str, Callable[[Result], str]]] = [
    ("geometric mean", lambda r: _ratio(r["error_geomean"], r["error_geomean"] <= 1)),
    ("worst", lambda r: _ratio(r["error_worst"], r["error_worst"] <= 1)),
    ("worst element", lambda r: _number(r["element_worst"])),
    ("PyTorch's", lambda r: _number(r["pytorch_element_worst"])),
]


def _table(
    title: str, labels: Sequence[str], columns: Sequence[tuple[str, Callable[[Result], str]]], rows: Sequence[Result]
) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    fixed = [key for key in labels if key in VARYING and len({row[key] for row in rows}) == 1]
    title = ", ".join([title, *(f"batch {rows[0][key]}" if key == "batch" else str(rows[0][key]) for key in fixed)])
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    shown = [key for key in labels if key not in fixed]
    for key in shown:
        table.add_column(key, overflow="fold" if key == "layer" else "ellipsis", no_wrap=key != "layer")
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells: list[Any] = [str(row[key]) for key in shown]
        if row.get("status", "ok") != "ok":
            cells.append(Text(row["status"], style="bold red"))
        else:
            cells += [show(row) for _, show in columns]
        table.add_row(*cells)
    return table


def tables(results: Sequence[Result], accuracy: bool) -> list[RenderableType]:
    """The entries, then the summary, then what failed."""
    from rich.text import Text

    if not results:
        return []
    out: list[RenderableType] = []
    columns, totals = (ERRORS, ERROR_TOTALS) if accuracy else (TIMES, TIME_TOTALS)
    for suite in dict.fromkeys(r["suite"] for r in results):
        of = [r for r in results if r["suite"] == suite]
        out += [_table(suite, ("layer", "count", "pass", "dtype", "layout", "batch"), columns, of), ""]
    key = totals[0][0]
    rows = [row for row in summarize(results) if ("error_geomean" if accuracy else "geomean") in row]
    if rows:
        what = "error over PyTorch's" if accuracy else "PyTorch's time over ours"
        out += [_table(f"{what} ({key} over layers; totals weighted by count)", (*GROUP, "entries"), totals, rows)]
    for result in results:
        if result["status"] != "ok":
            where = " ".join(str(result[k]) for k in ("suite", "layer", "pass", "dtype", "layout"))
            out.append(
                Text(f"{result['status']}: {where} batch {result['batch']}: {result['message']}", style="bold red")
            )
    return out


def heading(machine: dict[str, Any]) -> str:
    peaks = ", ".join(f"{value:.0f} GFLOP/s {dtype}" for dtype, value in machine["fma_gflops"].items())
    if machine.get("device", "cpu") != "cpu":
        return (
            f"{machine['device']}; cnnops {machine['cnnops']}, torch {machine['torch']}, cuDNN {machine['cudnn']}, "
            f"float32 as {machine['precision']}; matrix peak {peaks}, copy {machine['copy_gbps']:.1f} GB/s"
        )
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; cnnops {machine['cnnops']}, "
        f"torch {machine['torch']} ({machine['torch_cpu_capability']}); "
        f"FMA peak {peaks}, copy {machine['copy_gbps']:.1f} GB/s"
    )
