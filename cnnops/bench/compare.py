"""Finds regressions between two result files. Nothing here needs torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .report import geometric_mean
from .suites import SuiteError

if TYPE_CHECKING:
    from rich.console import RenderableType

KEY = ("suite", "layer", "pass", "dtype", "layout", "batch")


def read(path: str) -> dict[str, Any]:
    """A file that ``cnnops bench --json`` wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found["entries"], list):
            raise TypeError("entries is not a list")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SuiteError(f"{path} is not a result of `cnnops bench --json`: {error}") from None


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[dict[str, Any]]:
    """One row per entry of either file. ``change`` is the relative change of the ratio to PyTorch, which was timed
    beside cnnops each time: it moves less with the machine's mood than times do. ``verdict`` is regression (the ratio
    fell by more than the threshold, or a right result became wrong), improvement, same, or missing (not timed in both).
    """
    before = {tuple(e[k] for k in KEY): e for e in old["entries"]}
    after = {tuple(e[k] for k in KEY): e for e in new["entries"]}
    rows = []
    for key in dict.fromkeys((*before, *after)):
        was, now = before.get(key), after.get(key)
        row: dict[str, Any] = {**dict(zip(KEY, key, strict=True)), "old": was, "new": now, "change": None}
        if now is not None and now["status"] != "ok" and (was is None or was["status"] == "ok"):
            row["verdict"] = "regression"
        elif was is None or now is None or "ratio" not in was or "ratio" not in now:
            row["verdict"] = "missing"
        else:
            row["change"] = now["ratio"] / was["ratio"] - 1
            worse, better = row["change"] < -threshold, row["change"] > threshold
            row["verdict"] = "regression" if worse else "improvement" if better else "same"
        rows.append(row)
    return rows


def tables(
    rows: list[dict[str, Any]], old: dict[str, Any], new: dict[str, Any], threshold: float
) -> list[RenderableType]:
    """What changed, and the machines where they differ."""
    from rich.table import Table

    out: list[RenderableType] = []
    for key in ("cpu", "isa", "threads", "torch", "torch_cpu_capability"):
        values = old.get("environment", {}).get(key), new.get("environment", {}).get(key)
        if values[0] != values[1]:
            out.append(f"[yellow]{key} differs: {values[0]}, now {values[1]}[/yellow]")
    changed = sorted(
        (r for r in rows if r["verdict"] in ("regression", "improvement")), key=lambda r: r["change"] or -2
    )
    if changed:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("suite", "layer", "pass", "dtype", "layout", "batch"):
            table.add_column(column, overflow="fold")
        for column in ("old ms", "new ms", "PyTorch old ms", "new ms", "old ratio", "new ratio", "change"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in changed:
            cells = [str(row[key]) for key in KEY]
            if row["change"] is None:
                cells += ["", "", "", "", "", "", f"[bold red]{row['new']['status']}[/bold red]"]
            else:
                pair = row["old"], row["new"]
                cells += [f"{1e3 * r['ours']['median']:.3f}" for r in pair]
                cells += [f"{1e3 * r['pytorch']['median']:.3f}" for r in pair]
                cells += [f"{r['ratio']:.2f}" for r in pair]
                style = "red" if row["verdict"] == "regression" else "green"
                cells.append(f"[{style}]{100 * row['change']:+.1f}%[/{style}]")
            table.add_row(*cells)
        out.append(table)
    counts = {v: sum(r["verdict"] == v for r in rows) for v in ("regression", "improvement", "same", "missing")}
    both = [1 + r["change"] for r in rows if r["change"] is not None]
    mean = f"; geometric mean of the changes {100 * (geometric_mean(both) - 1):+.1f}%" if both else ""
    out.append(
        f"{counts['regression']} worse and {counts['improvement']} better by more than {100 * threshold:g}%, "
        f"{counts['same']} the same, {counts['missing']} not in both{mean}"
    )
    return out
