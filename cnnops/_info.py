"""What is known about this installation and this machine (``cnnops.info()``, ``cnnops info``)."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

OPENMP_RUNTIMES = ("libgomp", "libomp", "libiomp5")


class Info(dict[str, Any]):
    """A dict that prints as tables; ``json.dumps`` takes it as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.table import Table

        def section(title: str, rows: list[tuple[str, str]]) -> RenderResult:
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for row in rows:
                table.add_row(*row)
            yield f"[bold]{title}[/bold]"
            yield Padding(table, (0, 0, 1, 2))

        cpu, threads, cuda, torch_ = self["cpu"], self["threads"], self["cuda"], self["torch"]
        yield from section(
            "cnnops",
            [
                ("version", self["version"]),
                ("compiler", self["build"]["compiler"]),
                ("extension", self["build"]["path"]),
            ],
        )
        levels = []
        for level in cpu["levels"]:
            state = "chosen" if level["isa"] == cpu["isa"] else level["reason"] or "usable"
            levels.append((level["isa"], state))
        yield from section("CPU", [("model", cpu["model"]), ("cores", str(cpu["cores"])), *levels])
        runtimes = "\n".join(threads["runtimes"]) or "none found"
        yield from section("threads", [("per call", str(threads["count"])), ("OpenMP runtime", runtimes)])
        devices = "\n".join(cuda["devices"]) or "none"
        build = cuda["reason"] or f"{cuda['compiler']}, for {', '.join(cuda['capabilities'])}"
        yield from section("CUDA", [("build", build), ("devices", devices)])
        yield from section("torch", [("version", torch_["version"]), ("CPU capability", torch_["cpu_capability"])])

        table = Table(title="kernel chosen per op, pass and dtype", title_justify="left", box=None, pad_edge=False)
        for column in ("op", "pass", *self["dtypes"]):
            table.add_column(column)
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for kernel in self["kernels"]:
            row = cells.setdefault((kernel["op"], kernel["pass"]), {})
            row[kernel["dtype"]] = ", ".join(filter(None, (row.get(kernel["dtype"]), kernel["isa"])))
        for (op, pass_), of in cells.items():
            table.add_row(op, pass_, *(of.get(dtype, "-") for dtype in self["dtypes"]))
        yield table
        for warning in self["warnings"]:
            yield f"\n[bold red]warning[/bold red] {warning}"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None, force_terminal=False, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    __repr__ = __str__


def cpu_model() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """The files of the OpenMP runtimes loaded in this process, from ``/proc/self/maps`` (or its text, given)."""
    if maps is None:
        try:
            maps = Path("/proc/self/maps").read_text()
        except OSError:
            return []
    found: dict[str, None] = {}
    for line in maps.splitlines():
        path = line.split(maxsplit=5)[5] if line.count("/") else ""
        if os.path.basename(path).split(".")[0].split("-")[0] in OPENMP_RUNTIMES:
            found[path] = None
    return list(found)


def info() -> Info:
    """What cnnops runs on, as a dict that prints as tables.

    Keys: ``version``; ``build`` (compiler, instruction-set levels, path of the extension); ``cpu`` (model, cores, each
    level with whether it is built and supported and why it is not used, the chosen one); ``threads`` (count, OpenMP
    runtimes in the process); ``cuda``; ``torch``; ``dtypes`` and ``kernels`` (the one chosen per op, pass and dtype
    where it takes every problem); ``warnings`` (list of text).

    Raises:
        ImportError: the extension is missing or cannot be loaded.
        ValueError: ``CNNOPS_ISA`` names a level that cannot be used.

    Example:
        >>> cnnops.info()["cpu"]["isa"] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
        True
    """
    import torch

    from . import config
    from ._lib import C

    chosen, cap = C.isa_limit(), config.isa_limit()
    levels, above = [], False
    for level in C.isa_levels():
        reason = level["reason"]
        if above and level["built"] and level["supported"]:
            reason = f"usable, but CNNOPS_ISA={cap} caps the choice" if cap else "usable, but the choice is capped"
        above = above or level["isa"] == chosen
        levels.append({**level, "reason": reason})

    runtimes, warnings = openmp_runtimes(), []
    if len(runtimes) > 1:
        warnings.append(
            f"{len(runtimes)} OpenMP runtimes are loaded in this process, and their threads compete: "
            f"{', '.join(runtimes)}. "
            "Import torch before anything else that brings an OpenMP runtime."
        )
    rows, cuda_build = C.kernels(), C.cuda_build()
    kernels = [
        {key: row[key] for key in ("op", "pass", "dtype", "isa", "function")}
        for row in rows
        if row["selected"] and row["op"] != "peak"
    ]
    return Info(
        version=C.__version__,
        build={
            "compiler": C.compiler,
            "isa_levels": [level["isa"] for level in levels if level["built"]],
            "path": C.__file__,
        },
        cpu={"model": cpu_model(), "cores": cores(), "isa": chosen, "isa_cap": cap, "levels": levels},
        threads={"count": torch.get_num_threads(), "openmp_max": C.omp_max_threads(), "runtimes": runtimes},
        cuda={
            "built": cuda_build is not None,
            "reason": "" if cuda_build else "this build has no CUDA kernels",
            "compiler": cuda_build["compiler"] if cuda_build else None,
            "capabilities": cuda_build["capabilities"].split(",") if cuda_build else [],
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        torch={
            "version": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
        },
        python=platform.python_version(),
        system=platform.platform(),
        dtypes=list(dict.fromkeys(row["dtype"] for row in rows)),
        kernels=kernels,
        warnings=warnings,
    )
