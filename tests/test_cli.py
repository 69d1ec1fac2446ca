"""The command line and the benchmark behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import cnnops
from cnnops import functional
from cnnops._info import openmp_runtimes
from cnnops._lib import C
from cnnops.bench import cases, check, report, runner, suites, timing
from cnnops.cli import main

TINY = "conv2d C=8 H=9 W=9 K=8 R=3 S=3 stride=1 pad=1 count=2\navg_pool2d C=8 H=9 W=9 kernel=3 stride=2 pad=1 count=1\n"
QUICK = ("--batch", "2", "--min-time", "0", "--repeats", "2", "--warmup", "1")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # From where the package under test lies: `-m` puts the current folder first, which may be an unbuilt source tree.
    home = Path(cnnops.__file__).parent.parent
    variables = {**os.environ, "PYTHONPATH": str(home), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        cwd=home,
        timeout=120,
        check=False,
    )


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.txt"
    path.write_text(TINY)
    return path


@pytest.fixture(autouse=True)
def cheap_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks are measured in a test of their own."""
    monkeypatch.setattr(runner, "fma_peak", lambda dtype, threads: 1e11)
    monkeypatch.setattr(runner, "copy_bandwidth", lambda: 1e10)


# ---- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("bench",), ("info",), ("summary",), ("bench", "compare")], ids=" ".join)
def test_help_is_quick_and_leaves_torch_alone(command: tuple[str, ...]) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from cnnops.cli import main\n"
        f"try: main([*{command!r}, '--help'], prog_name='cnnops')\n"
        "except SystemExit as end: assert not end.code\n"
        "for name in ('torch', 'numpy', 'rich'): assert name not in sys.modules, name\n"
    )
    times = []
    for _ in range(5):  # the machine may be busy
        start = time.perf_counter()
        done = python("-c", code)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "Usage: cnnops" in done.stdout
        if times[-1] < 0.3:
            return
    raise AssertionError(f"--help took {times} s")


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_runs_here() -> None:
    found = json.loads(cli("info", "--json").output)
    assert found["version"] == C.__version__
    assert found["build"]["compiler"] == C.compiler
    assert found["cpu"]["isa"] == C.isa_limit()
    levels = {level["isa"]: level for level in found["cpu"]["levels"]}
    assert list(levels) == ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    for level in levels.values():
        assert (level["built"] and level["supported"]) or level["reason"]
    assert found["threads"]["count"] == torch.get_num_threads()
    assert found["torch"]["version"] == torch.__version__
    assert found["cuda"]["devices"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    chosen = {(k["op"], k["pass"], k["dtype"]): k["isa"] for k in found["kernels"]}
    rows = [r for r in C.kernels() if r["op"] != "peak"]
    assert chosen == {(r["op"], r["pass"], r["dtype"]): r["isa"] for r in rows if r["selected"]}
    assert set(chosen) == {(r["op"], r["pass"], r["dtype"]) for r in rows if r["isa"] == "baseline"}


def test_info_prints_as_tables() -> None:
    text = cli("info").output
    assert sum(line.split()[:1] == ["avg_pool2d"] for line in text.splitlines()) == 2  # forward, backward
    assert C.compiler in text
    assert "avg_pool2d" in repr(cnnops.info())
    assert str(cnnops.info()) == repr(cnnops.info())


def test_info_in_a_fresh_process_has_one_openmp_runtime_and_honours_the_cap() -> None:
    done = python("-m", "cnnops", "info", "--json", CNNOPS_ISA="baseline")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["threads"]["runtimes"]) == 1, found["threads"]
    assert found["warnings"] == []
    assert found["cpu"]["isa"] == "baseline"
    above = [level for level in found["cpu"]["levels"] if level["isa"] != "baseline"]
    assert above
    assert all(level["reason"] for level in above)
    assert {k["isa"] for k in found["kernels"]} == {"baseline"}


def test_a_bad_cap_is_an_error_without_a_traceback() -> None:
    done = python("-m", "cnnops", "info", CNNOPS_ISA="avx1024")
    assert done.returncode == 1
    assert "avx1024" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_openmp_runtimes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = (
        "7f0-7f1 r-xp 0 08:01 1 /v/torch/lib/libgomp.so.1\n"
        "7f1-7f2 r--p 0 08:01 1 /v/torch/lib/libgomp.so.1\n"
        "7f2-7f3 r-xp 0 08:01 2 /my libs/sk.libs/libgomp-d22c30c5.so.1.0.0\n"
        "7f3-7f4 r-xp 0 08:01 3 /v/torch/lib/libtorch_cpu.so\n"
        "7f4-7f5 rw-p 0 00:00 0 \n"
    )
    found = openmp_runtimes(maps)
    assert found == ["/v/torch/lib/libgomp.so.1", "/my libs/sk.libs/libgomp-d22c30c5.so.1.0.0"]
    monkeypatch.setattr("cnnops._info.openmp_runtimes", lambda: found)
    (warning,) = cnnops.info()["warnings"]
    assert "2 OpenMP runtimes" in warning


# ---- summary ---------------------------------------------------------------------------------------------------------


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    c = 3
    for k in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(c, k, 3, padding=1), nn.ReLU()] if k else [nn.MaxPool2d(2)]
        c = k or c
    head = [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, *head)


def test_summary_of_vgg16() -> None:
    with torch.device("meta"):
        model = vgg16()
    found = cnnops.summary(model, (3, 224, 224))
    assert found.parameters == 138_357_544
    assert found.multiply_adds == 15_470_264_320
    pools = [row for row in found.rows if row.type == "MaxPool2d"]
    # Araujo et al., Distill 2019: 212 pixels, stride 32, at the last pooling.
    assert [row.receptive_field for row in pools] == [(n, n) for n in (6, 16, 44, 100, 212)]
    assert pools[-1].jump == (32, 32)
    assert found.rows[-1].receptive_field == (float("inf"), float("inf"))


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, (5, 3), padding=(4, 1), dilation=(2, 1))
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.wide(x))) + x
        return self.last(torch.cat((x, self.up(self.down(y))), 1))


def test_summary_follows_the_longest_path_and_leaves_the_model_alone() -> None:
    model = Paths().train()
    model.last.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cnnops.summary(model, (4, 16, 16), batch=2)
    fields = {row.name: (row.receptive_field, row.jump) for row in found.rows}
    assert fields["wide"] == ((9, 3), (1, 1))
    assert fields["norm"] == ((9, 3), (1, 1))
    assert fields["down"] == ((10, 4), (2, 2))
    assert fields["up"] == ((10, 4), (1, 1))
    assert fields["last"] == ((10, 4), (1, 1))
    rows = {row.name: row for row in found.rows}
    assert rows["down"].output == (2, 4, 8, 8)
    assert rows["down"].multiply_adds == 2 * 4 * 8 * 8 * 4 * 4
    assert rows["up"].multiply_adds == rows["down"].multiply_adds
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="positive"):
        cnnops.summary(model, (4, 0, 16))
    with pytest.raises(TypeError, match="Module"):
        cnnops.summary("resnet50")  # type: ignore[arg-type]


def test_summary_follows_our_own_ops() -> None:
    class Ours(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.conv2d(x, torch.empty(4, 3, 5, 3, device="meta"), stride=2, dilation=2)
            self.leaf(y)
            return self.leaf(functional.avg_pool2d(y, 2))

        def __init__(self) -> None:
            super().__init__()
            self.leaf = nn.Identity()

    first, second = cnnops.summary(Ours(), (3, 40, 40)).rows
    assert (first.receptive_field, first.jump) == ((9, 5), (2, 2))
    assert (second.receptive_field, second.jump) == ((11, 7), (4, 4))


def test_summary_command(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1))\n"
    )
    text = cli("summary", f"{path}:net", "--input", "3,32,32").output
    assert "8x30x30" in text
    assert "194,400" in text  # multiply-adds: 8 * 30 * 30 * 27
    found = json.loads(cli("summary", f"{path}:net", "--input", "3,32,32", "--json").output)
    assert found["parameters"] == 224
    assert [layer["receptive_field"] for layer in found["layers"]] == [[3, 3], "all"]
    for bad in ("nothing.here:net", f"{path}:nope", "resnet50"):
        failed = cli("summary", bad)
        assert failed.exit_code == 2
        assert "MODEL" in failed.output


# ---- suites ----------------------------------------------------------------------------------------------------------

# Layers, multiply-adds of one image and convolution weights, without fully connected layers and biases: those of the
# published networks (resnet50: 4.09 G with its classifier's 2.05 M; vgg16: 15.47 G; mobilenet_v2: 0.30 G); of `memory`,
# what its lines amount to.
KNOWN = {
    "resnet50": (
        {"conv2d": 53, "batch_norm": 53, "max_pool2d": 1, "adaptive_avg_pool2d": 1}, 4_087_136_256, 23_454_912,
    ),
    "vgg16": ({"conv2d": 13, "max_pool2d": 5, "adaptive_avg_pool2d": 1}, 15_346_630_656, 14_710_464),
    "mobilenet_v2": ({"conv2d": 52, "batch_norm": 52, "adaptive_avg_pool2d": 1}, 299_494_272, 2_189_760),
    "efficientnet_b0": ({"conv2d": 81, "batch_norm": 49, "adaptive_avg_pool2d": 17}, 384_534_752, 3_956_192),
    "convnext_tiny": ({"conv2d": 22, "adaptive_avg_pool2d": 1}, 292_965_120, 1_877_472),
    "unet": ({"conv2d": 19, "conv_transpose2d": 4, "batch_norm": 18, "max_pool2d": 4}, 48_171_581_440, 31_024_960),
    "memory": (
        {
            "batch_norm": 11, "max_pool2d": 6, "avg_pool2d": 5, "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 1,
            "median_pool2d": 4, "conv2d": 7, "locally_connected2d": 3,
        },
        82_878_208, 34_541_008,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", suites.SUITES)
def test_suite_has_the_layers_of_its_network(name: str) -> None:
    layers = suites.load(name)
    counts: Counter[str] = Counter()
    for layer in layers:
        counts[layer.op] += layer.count
    assert (dict(counts), sum(a.macs() * a.count for a in layers), sum(a.weights() * a.count for a in layers)) == KNOWN[
        name
    ]
    assert len({layer.text for layer in layers}) == len(layers)
    assert [suites.parse_line(layer.line()) for layer in layers] == layers


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("conv3d C=1", "unknown op"),
        ("conv2d C=1 H=2 W=2 K=1 R=1", "needs S="),
        ("batch_norm C=1 H=2 W=2 Z=3", "Z=3"),
        ("batch_norm C=1 C=1 H=2 W=2", "twice"),
        ("batch_norm C=one H=2 W=2", "whole number"),
        ("max_pool2d C=1 H=2 W=2 kernel=1,2,3", "kernel takes"),
    ],
)
def test_a_bad_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(suites.SuiteError, match=says):
        suites.parse_line(line)
    path = tmp_path / "bad.txt"
    path.write_text(line)
    failed = cli("bench", path)
    assert failed.exit_code == 1
    assert says in failed.output
    assert "Traceback" not in failed.output


def test_sizes_of_outputs_are_torchs() -> None:
    pool = suites.parse_line("max_pool2d C=2 H=11 W=8 kernel=3,2 stride=2 pad=1,0 ceil=1")
    assert pool.output == F.max_pool2d(torch.zeros(1, 2, 11, 8), (3, 2), 2, (1, 0), ceil_mode=True).shape[2:]
    conv = suites.parse_line("conv_transpose2d C=2 H=5 W=6 K=3 R=3 S=2 stride=2,3 pad=1,0 output_pad=1,2 dilation=2,1")
    expected = F.conv_transpose2d(
        torch.zeros(1, 2, 5, 6), torch.zeros(2, 3, 3, 2), None, (2, 3), (1, 0), (1, 2), 1, (2, 1)
    )
    assert conv.output == expected.shape[2:]


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench_checks_times_and_writes(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = cli("bench", tiny, *QUICK, "--dtype", "float32,bfloat16", "--json", out)
    assert done.exit_code == 0, done.output
    assert "geometric mean" in done.output
    found = json.loads(out.read_text())
    entries = found["entries"]
    assert len(entries) == (3 + 2) * 2 * 2  # passes, dtypes, layouts
    for entry in entries:
        assert entry["status"] == "ok", entry
        assert entry["ours"]["median"] > 0
        assert entry["ours"]["samples"] >= 2
        assert entry["ratio"] > 0
        itemsize = 4 if entry["dtype"] == "float32" else 2
        if entry["op"] == "avg_pool2d":
            assert entry["bytes"] == 2 * 8 * (81 + 25) * itemsize
            assert entry["flops"] is None
        else:
            assert entry["bytes"] == (2 * 2 * 8 * 81 + 8 * 8 * 9) * itemsize
            assert entry["flops"] == 2 * 2 * 81 * 8 * 8 * 9
            assert entry["fma_percent"] == pytest.approx(entry["gflops"])
    assert {"cpu", "cores", "isa", "threads", "torch", "date", "fma_gflops", "copy_gbps"} <= set(found["environment"])
    row = next(row for row in found["summary"] if row["op"] == "conv2d" and row["pass"] == "forward")
    of = [e for e in entries if all(e[key] == row[key] for key in report.GROUP)]
    assert row["total_ours"] == pytest.approx(sum(e["count"] * e["ours"]["median"] for e in of))


def test_bench_options_choose_entries(tiny: Path) -> None:
    def listed(*options: str) -> list[str]:
        return cli("bench", tiny, "--list", *options).output.splitlines()

    assert len(listed()) == 10
    assert len(listed("--layout", "nchw", "--batch", "1,4,16")) == 15
    assert len(listed("--pass", "backward")) == 6
    assert len(listed("--pass", "backward-weight")) == 2
    assert len(listed("--op", "avg_pool2d", "--pass", "forward")) == 2
    assert len(listed("--filter", "R=3", "--filter", "^conv2d")) == 6
    assert cli("bench", tiny, "--filter", "nothing").exit_code == 2
    assert cli("bench", tiny, "--dtype", "float31").exit_code == 2
    assert cli("bench", tiny, "--batch", "0").exit_code == 2
    assert cli("bench", "nosuite").exit_code == 1


def slightly_wrong(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(*arguments: Any, **options: Any) -> Tensor:
        y = function(*arguments, **options)
        y[..., -1, -1] *= 1 + 1e-4
        return y

    return wrong


def test_a_wrong_answer_is_never_timed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "conv2d", slightly_wrong(functional.conv2d))
    timed: list[Any] = []
    monkeypatch.setattr(runner, "in_turn", lambda *a: timed.append(a) or timing.in_turn(*a))
    out = tmp_path / "out.json"
    done = cli("bench", tiny, *QUICK, "--pass", "forward", "--layout", "nchw", "--json", out)
    assert done.exit_code == 1
    assert "wrong" in done.output
    wrong, right = json.loads(out.read_text())["entries"]
    assert wrong["status"] == "wrong"
    assert "elements are wrong" in wrong["message"]
    assert "ours" not in wrong
    assert right["status"] == "ok"
    assert len(timed) == 1


def test_a_failing_op_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(functional, "avg_pool2d", fail)
    done = cli("bench", tiny, *QUICK)
    assert done.exit_code == 1
    assert "no such luck" in done.output


@pytest.mark.parametrize("data", cases.DATA)
def test_accuracy_is_held_beside_pytorchs(tiny: Path, tmp_path: Path, data: str) -> None:
    out = tmp_path / "out.json"
    done = cli("bench", tiny, "--batch", "2", "--accuracy", "--data", data, "--json", out)
    assert done.exit_code == 0, done.output
    for entry in json.loads(out.read_text())["entries"]:
        assert "ours" not in entry
        assert 0 < entry["check"]["rms"] < 1e-5
        assert 0 < entry["pytorch_check"]["rms"] < 1e-5
        assert entry["error_ratio"] == pytest.approx(entry["check"]["rms"] / entry["pytorch_check"]["rms"])


def test_accuracy_of_float64_is_refused(tiny: Path) -> None:
    assert cli("bench", tiny, "--accuracy", "--dtype", "float64").exit_code == 2


SHAPES = (
    "conv2d C=6 H=7 W=8 K=9 R=3 S=2 stride=2,1 pad=1,0 dilation=1,2 groups=3 bias=1",
    "conv2d C=40 H=6 W=5 K=48 R=1 S=3 pad=0,1",
    "conv2d C=9 H=6 W=5 K=8 R=3 S=3 pad=1 activation=silu residual=1 bias=1",
    "conv_transpose2d C=6 H=5 W=6 K=9 R=3 S=3 stride=2 pad=1 output_pad=1 groups=3 bias=1",
    "locally_connected2d C=3 H=7 W=6 K=4 R=3 S=2 stride=2,1 pad=1 dilation=1 bias=1",
    "max_pool2d C=5 H=9 W=8 kernel=3 stride=2 pad=1 ceil=1",
    "avg_pool2d C=5 H=9 W=8 kernel=3,2 stride=2 pad=1 ceil=1",
    "median_pool2d C=5 H=9 W=8 kernel=3 stride=1 pad=1",
    "adaptive_avg_pool2d C=5 H=9 W=8 P=4 Q=3",
    "adaptive_max_pool2d C=5 H=9 W=8 P=4 Q=3",
    "batch_norm C=5 H=9 W=8",
    "batch_norm C=5 H=9 W=8 training=0",
    "batch_norm C=5 H=9 W=8 activation=relu residual=1",
    "batch_norm C=5 H=9 W=8 activation=hardswish",
)


@pytest.mark.parametrize("line", SHAPES)
def test_the_truth_agrees_with_pytorch_and_sees_a_wrong_element(line: str) -> None:
    layer = suites.parse_line(line)
    for pass_ in cases.passes(layer):
        case = cases.build(layer, pass_, torch.float64, "channels_last", 2)
        with torch.no_grad():
            result = case.theirs()
        verdict = check.verify(case.parts(result))
        assert not verdict.wrong, (pass_, verdict)
        assert verdict.rms < 1e-12
        y = result[0] if isinstance(result, tuple) else result
        bad = y.clone(memory_format=torch.preserve_format)
        bad[(-1,) * bad.dim()] += 1e-6
        broken = (bad, *result[1:]) if isinstance(result, tuple) else bad
        assert "1 of" in check.verify(case.parts(broken)).wrong


def test_a_missing_tap_is_seen_in_float32() -> None:
    layer = suites.parse_line("conv2d C=256 H=14 W=14 K=16 R=3 S=3 pad=1")
    case = cases.build(layer, "forward", torch.float32, "nchw", 1)
    x, weight = case.ours.args[:2]  # type: ignore[attr-defined]
    assert not check.verify(case.parts(F.conv2d(x, weight, padding=1))).wrong
    without = weight.clone()
    without[:, 100, 1, 2] = 0
    assert check.verify(case.parts(F.conv2d(x, without, padding=1))).wrong


def test_times_are_taken_in_turn() -> None:
    calls: list[str] = []

    def a() -> None:
        calls.append("a")
        time.sleep(0.002)

    def b() -> None:
        calls.append("b")
        time.sleep(0.004)

    ours, theirs, ratio = timing.in_turn(a, b, warmup=1, repeats=4, min_time=0)
    assert "".join(calls[-8:]) == "abbaabba"
    assert 1.2 < ratio < 4
    assert (ours.samples, theirs.samples) == (4, 4)
    assert ours.best <= ours.median


def test_peaks_are_measured() -> None:
    assert timing.fma_peak(torch.float32, 1) > 1e9
    assert timing.copy_bandwidth(1 << 22) > 1e8


# ---- compare ---------------------------------------------------------------------------------------------------------


def result(path: Path, ratios: dict[str, float], **status: str) -> Path:
    entries = []
    for layer, ratio in ratios.items():
        entry: dict[str, Any] = {
            "suite": "s", "layer": layer, "op": "conv2d", "count": 1, "pass": "forward", "dtype": "float32",
            "layout": "nchw", "batch": 1, "status": status.get(layer, "ok"), "message": "",
        }  # fmt: skip
        if entry["status"] == "ok":
            entry.update(ratio=ratio, ours={"median": 1 / ratio}, pytorch={"median": 1.0})
        entries.append(entry)
    path.write_text(json.dumps({"environment": {"cpu": "c"}, "entries": entries}))
    return path


def test_compare_finds_a_regression(tmp_path: Path) -> None:
    old = result(tmp_path / "old.json", {"a": 2.0, "b": 1.0, "c": 3.0})
    same = result(tmp_path / "same.json", {"a": 1.95, "b": 1.5, "d": 1.0})
    slow = result(tmp_path / "slow.json", {"a": 1.8, "b": 1.5, "c": 3.0})
    wrong = result(tmp_path / "wrong.json", {"a": 2.0, "b": 1.0, "c": 3.0}, c="wrong")
    fine = cli("bench", "compare", old, same)
    assert fine.exit_code == 0, fine.output
    assert "0 worse and 1 better" in fine.output
    assert "2 not in both" in fine.output
    worse = cli("bench", "compare", old, slow)
    assert worse.exit_code == 1
    assert "-10.0%" in worse.output
    assert cli("bench", "compare", old, slow, "--threshold", "0.2").exit_code == 0
    broken = cli("bench", "compare", old, wrong)
    assert broken.exit_code == 1
    assert "wrong" in broken.output


def test_compare_names_a_file_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    failed = cli("bench", "compare", path, path)
    assert failed.exit_code == 1
    assert "x.json is not a result" in failed.output
