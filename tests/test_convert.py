"""convert_ and revert_: the model afterwards, what survives, and the report."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import MODELS, Block, ResNet, UNet, images, near, step
from place import DEVICE
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import cnnops
import cnnops.functional as CF

CALLED = ("conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "batch_norm")  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each function of cnnops.functional was called."""
    counter: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return function(*args, **kwargs)

        return wrapper

    for name in CALLED:
        monkeypatch.setattr(CF, name, counting(name, getattr(CF, name)))
    return counter


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model twice, the second converted."""
    plain = MODELS[name]().to(dtype)
    ours = copy.deepcopy(plain)
    cnnops.convert_(ours)
    return plain, ours


def ours_of(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if type(m).__module__ == "cnnops.nn"]


# ---- The same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients(name: str, dtype: torch.dtype, format: torch.memory_format) -> None:
    plain, ours = (model.to(memory_format=format) for model in pair(name, dtype))
    for training in (True, True, False):
        x = images(dtype=dtype, format=format)
        plain.train(training)
        ours.train(training)
        near(step(ours, x), step(plain, x), None if dtype == torch.float64 else 2e-4)
    with torch.no_grad():
        near(ours(x), plain(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_runs_on_cnnops(name: str, calls: Counter[str]) -> None:
    plain, ours = pair(name)
    plain(images())
    assert not calls
    ours(images())
    kinds = Counter(type(m).__name__ for m in ours.modules() if type(m).__module__ == "cnnops.nn")
    functions = {"Conv2d": "conv2d", "ConvTranspose2d": "conv_transpose2d", "MaxPool2d": "max_pool2d",
                 "AvgPool2d": "avg_pool2d", "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
                 "AdaptiveMaxPool2d": "adaptive_max_pool2d", "BatchNorm2d": "batch_norm"}  # fmt: skip
    assert calls == {functions[kind]: n for kind, n in kinds.items() if kind in functions}
    assert set(kinds) - set(functions) <= {"ReLU", "ReLU6", "SiLU", "Hardswish", "GELU"}
    calls.clear()
    cnnops.revert_(ours)
    ours(images())
    assert not calls


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_revert_leave_nothing_behind(name: str) -> None:
    plain = MODELS[name]()
    before = {n: (type(m), dict(vars(m))) for n, m in plain.named_modules()}
    cnnops.convert_(plain)
    assert ours_of(plain)
    cnnops.revert_(plain)
    for n, m in plain.named_modules():
        kind, attributes = before[n]
        assert type(m) is kind
        assert vars(m).keys() == attributes.keys()
        assert all(vars(m)[key] is value for key, value in attributes.items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", MODELS)
def test_optimizer_made_before_keeps_training(name: str, optimizer: type) -> None:
    torch.manual_seed(1)
    plain = MODELS[name]().double()
    ours = copy.deepcopy(plain)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    runs = [(m, optimizer(m.parameters(), lr=0.02, **options)) for m in (plain, ours)]
    for i in range(6):
        if i == 2:  # in the middle of training
            cnnops.convert_(ours)
        x = images(dtype=torch.float64)
        losses = []
        for model, opt in runs:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss)
        near(losses[1], losses[0], 1e-9)
    near(ours.state_dict(), plain.state_dict(), 1e-8)
    assert ours_of(ours)


# ---- What survives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_goes_both_ways(name: str) -> None:
    plain, ours = pair(name)
    ours(images())
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(ours.state_dict())
    fresh = MODELS[name]()
    cnnops.convert_(fresh)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    x = images()
    near(fresh.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name: str, way: str) -> None:
    _, ours = pair(name)
    ours(images())
    ours.eval()
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert ours_of(twin) == ours_of(ours)
    x = images()
    assert torch.equal(twin(x), ours(x))
    before = ours(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(ours(x), before)


def test_hooks() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    seen: list[str] = []
    conv = model[0]
    conv.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    conv.register_forward_hook(lambda m, args, out: out * 2)
    conv.register_full_backward_pre_hook(lambda m, grad: seen.append("backward pre"))
    conv.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(f"backward {grad_in[0].shape[1]}"))
    model[1].register_forward_hook(lambda m, args, out: seen.append(type(m).__module__))
    conv.weight.register_hook(lambda grad: seen.append("weight"))
    x = images().requires_grad_()
    expected = model(x)
    expected.sum().backward()
    plain_order, grad = list(seen), x.grad
    seen.clear()
    x.grad = None
    cnnops.convert_(model)
    y = model(x)
    y.sum().backward()
    near(y, expected)
    near(x.grad, grad, 1e-2)  # (the gradient of a normalized sum is zero up to rounding; that it exists is the point)
    assert seen == ["cnnops.nn" if s.startswith("torch") else s for s in plain_order]


def test_shared_modules_stay_shared() -> None:
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), conv)
    model = torch.nn.ModuleDict({"a": block, "b": block, "c": conv})
    report = cnnops.convert_(model)
    assert model["a"] is model["b"]
    assert model["a"][1] is model["c"] is conv
    assert [s.name for s in report.swapped] == ["a.0, b.0", "a.1, b.1, c"]
    x = torch.randn(1, 4, 6, 6)
    model["a"](model["c"](x)).sum().backward()
    assert len(list(model.parameters())) == 4


def test_module_that_contains_itself() -> None:
    model = torch.nn.Module()
    model.conv = torch.nn.Conv2d(2, 2, 1)
    model.child = torch.nn.Module()
    model.child.parent = model
    assert [s.name for s in cnnops.convert_(model).swapped] == ["conv"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "normalize",
    [
        torch.nn.utils.weight_norm,
        parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
@pytest.mark.parametrize("layer", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_reparametrized_weights(normalize: Callable[..., Any], layer: type, calls: Counter[str]) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(7)
        return torch.nn.Sequential(normalize(layer(3, 5, 3)), torch.nn.Tanh()).double()

    plain, ours = build(), build()
    twin = getattr(cnnops.nn, layer.__name__)
    report = cnnops.convert_(ours)
    assert [s.name for s in report.swapped] == ["0"]
    assert isinstance(ours[0], twin)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    opts = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, ours)]
    for _ in range(3):
        x = images(dtype=torch.float64)
        for model, opt in zip((plain, ours), opts, strict=True):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    near(ours.state_dict(), plain.state_dict(), 1e-9)
    assert calls["conv2d" if layer is torch.nn.Conv2d else "conv_transpose2d"] == 3
    near(ours.eval()(x), plain.eval()(x), 1e-9)
    assert not cnnops.convert_(ours).swapped
    cnnops.revert_(ours)
    assert isinstance(ours[0], layer)
    assert not isinstance(ours[0], twin)
    near(ours(x), plain(x), 1e-9)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_are_copied_and_removed(name: str) -> None:
    plain = torch.nn.Sequential(getattr(parametrizations, name)(torch.nn.Conv2d(3, 5, 3))).eval()
    expected = plain(x := images())
    ours = copy.deepcopy(plain)  # shares the class that parametrize made
    cnnops.convert_(ours)
    assert type(plain[0]).__bases__ == (torch.nn.Conv2d,)
    assert type(ours[0]).__bases__ == (cnnops.nn.Conv2d,)
    near(copy.deepcopy(ours)(x), expected)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(ours)
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is cnnops.nn.Conv2d
    near(ours(x), expected)
    near(plain(x), expected)


def test_parametrized_after_conversion() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3))
    cnnops.convert_(model)
    parametrizations.weight_norm(model[0])
    x = images()
    y = model(x)
    assert [s.name for s in cnnops.revert_(model).swapped] == ["0"]
    near(model(x), y)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is torch.nn.Conv2d


def test_pruned_weights() -> None:
    from torch.nn.utils import prune

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    expected = model(x := images())
    cnnops.convert_(model)
    near(model(x), expected)
    prune.remove(model[0], "weight")
    near(model(x), expected)


# ---- Through PyTorch's machinery -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_compile(name: str, training: bool) -> None:
    plain, ours = pair(name, torch.float64)
    plain.train(training)
    ours.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for n in (2, 2, 3):  # the third with another batch size: recompiled with a dynamic one
        x = images(n, dtype=torch.float64)
        got, expected = step(compiled, x), step(plain, x)
        near(got[:2], expected[:2])
        near({k.removeprefix("_orig_mod."): v for k, v in got[2].items()}, expected[2])
        near({k.removeprefix("_orig_mod."): v for k, v in got[3].items()}, expected[3])


def test_compiled_model_follows_the_exchange() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)).eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images()
    with torch.no_grad():
        expected = compiled(x)
        report = cnnops.convert_(compiled)  # through torch.compile's wrapper
        assert [s.name for s in report.swapped] == ["_orig_mod.0", "_orig_mod.1"]
        near(compiled(x), expected)
    assert ["cnnops.conv2d" in code for code in graphs] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_export(name: str, strict: bool) -> None:
    plain, ours = pair(name)
    plain(images())
    ours.load_state_dict(plain.state_dict())
    plain.eval()
    ours.eval()
    program = torch.export.export(ours, (images(2),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    assert any("cnnops" in str(node.target) for node in program.graph.nodes)
    x = images(4)
    near(program.module()(x), plain(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    near(torch.export.load(file).module()(x), plain(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    plain, ours = pair("unet", torch.float64)
    x = images(dtype=torch.float64)
    near(step(lambda_module(ours, lambda t: checkpoint(ours, t, use_reentrant=reentrant)), x)[:2], step(plain, x)[:2])
    near([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])


def lambda_module(owner: torch.nn.Module, function: Callable[[Tensor], Tensor]) -> torch.nn.Module:
    module = torch.nn.Module()
    module.owner = owner
    module.forward = function  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients(name: str) -> None:
    plain, ours = pair(name, torch.float64)
    x = images(3, dtype=torch.float64)
    plain(x)  # running statistics of a real batch
    ours.load_state_dict(plain.state_dict())
    plain.eval()
    ours.eval()

    def per_sample(model: torch.nn.Module) -> Any:
        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

        parameters = {n: p.detach() for n, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    got = per_sample(ours)
    near(got, per_sample(plain))
    ours.zero_grad()
    ours(x[1:2]).square().sum().backward()
    near({n: g[1] for n, g in got.items()}, {n: p.grad for n, p in ours.named_parameters()})


def test_ensembles() -> None:
    """vmap over the weights."""
    models = [pair("depthwise", torch.float64)[1].eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    x = images(2, dtype=torch.float64)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (p, b), (x,))

    near(torch.func.vmap(call)(parameters, buffers), torch.stack([m(x) for m in models]))


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode(name: str) -> None:
    plain, ours = pair(name, torch.float64)
    x, tangent = images(dtype=torch.float64), images(dtype=torch.float64)
    plain(x)
    ours.load_state_dict(plain.state_dict())
    for model in (plain.eval(), ours.eval()):
        for p in model.parameters():
            p.requires_grad_(False)
    near(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)))


@pytest.mark.parametrize("name", MODELS)
def test_inference_mode(name: str) -> None:
    plain, ours = pair(name)
    x = images()
    with torch.inference_mode():
        y = ours.eval()(x)
        near(y, plain.eval()(x))
    assert y.is_inference()


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    plain, ours = pair(name)
    x = images()
    outputs = []
    for model in (ours, plain):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        outputs.append((y, {n: p.grad for n, p in model.named_parameters()}))
    assert outputs[0][0].dtype == outputs[1][0].dtype
    near(outputs[0][0], outputs[1][0], 5e-2)
    for n, grad in outputs[1][1].items():
        assert outputs[0][1][n].dtype == grad.dtype
        if grad.abs().max() > 1e-2:
            near(outputs[0][1][n], grad, 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    plain, ours = pair("unet", dtype)
    x = images(dtype=dtype)
    near(ours(x), plain(x), 5e-2)


def test_fx_graphs() -> None:
    plain, ours = pair("resnet")
    graph = torch.fx.symbolic_trace(ours)
    called = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    assert {"stem.0", "stem.1", "stem.3", "blocks.0.conv1", "pool"} <= set(called)
    x = images()
    near(graph(x), plain(x))
    graph = torch.fx.symbolic_trace(copy.deepcopy(plain))
    assert len(cnnops.convert_(graph).swapped) == len(ours_of(ours))
    near(graph(x), plain(x))


def test_fuse_conv_bn() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    model(images())
    model.eval()
    cnnops.convert_(model)
    fused = fuse_conv_bn_eval(model[0], model[1])
    assert type(fused) is cnnops.nn.Conv2d
    near(fused(x := images()), model(x))


def test_meta_model() -> None:
    with torch.device("meta"):
        model = ResNet()
    report = cnnops.convert_(model)
    assert len(report.swapped) == len(ours_of(model))
    assert model(images().to("meta")).shape == (3, 5)
    model.to_empty(device=DEVICE).load_state_dict(ResNet().state_dict())
    assert model(images()).isfinite().all()


# ---- What is exchanged, and the report -------------------------------------------------------------------------------


class Subclass(torch.nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def skipped(layer: torch.nn.Module) -> str:
    model = torch.nn.Sequential(layer)
    before = type(layer)
    (entry,) = (report := cnnops.convert_(model)).skipped
    assert not report.swapped
    assert type(model[0]) is before
    assert entry.name == "0"
    assert entry.type is before
    return entry.reason


def test_subclasses_are_left() -> None:
    assert "subclass of torch.nn.Conv2d" in skipped(Subclass(3, 4, 3))
    assert "subclass of torch.nn.Conv2d" in skipped(parametrizations.weight_norm(Subclass(3, 4, 3)))


def test_sync_batch_norm_is_left() -> None:
    assert "between processes" in skipped(torch.nn.SyncBatchNorm(4))
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    cnnops.convert_(model)
    assert type(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is torch.nn.SyncBatchNorm


@pytest.mark.parametrize(
    ("lazy", "args"), [("LazyConv2d", (4, 3)), ("LazyConvTranspose2d", (4, 3)), ("LazyBatchNorm2d", ())]
)
def test_lazy_layers_are_left_until_they_know_their_shape(lazy: str, args: tuple[int, ...]) -> None:
    model = torch.nn.Sequential(getattr(torch.nn, lazy)(*args))
    assert "lazy" in skipped(model[0])
    expected = model.eval()(x := images())
    assert [s.name for s in cnnops.convert_(model).swapped] == ["0"]
    near(model(x), expected)


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_left() -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")
    qat = pytest.importorskip("torch.ao.nn.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    assert skipped(qat.Conv2d(3, 4, 3, qconfig=quantization.get_default_qat_qconfig("x86"))) == "quantized"
    try:
        layer = quantized.Conv2d(3, 4, 3)
    except RuntimeError:
        pytest.skip("no engine for quantized layers here")
    assert skipped(layer) == "quantized"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_left() -> None:
    model = torch.nn.Sequential(
        torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))), torch.nn.Conv2d(4, 4, 1)
    )
    report = cnnops.convert_(model)
    assert [s.name for s in report.swapped] == ["1"]
    assert [(s.name, s.reason) for s in report.skipped] == [("0", "compiled by TorchScript")]
    model(images())
    cnnops.revert_(model)
    torch.jit.script(model[1])


def test_replaced_forwards_are_left() -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    old = layer.forward
    layer.forward = lambda x: old(x) + 1  # type: ignore[method-assign]
    assert "forward was replaced" in skipped(layer)


def test_wrappers_are_entered() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.nn.DataParallel(Block(3, 4, 2))
    expected = model(x := images())
    report = cnnops.convert_(model)
    assert [s.name for s in report.swapped][:2] == ["module.conv1", "module.bn1"]
    near(model(x), expected)


def test_other_layers_are_not_mentioned() -> None:
    kinds = (torch.nn.Conv1d(3, 4, 3), torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(3), torch.nn.MaxPool1d(2))
    model = torch.nn.Sequential(*kinds, torch.nn.Tanh(), torch.nn.Conv3d(3, 4, 3), torch.nn.Identity())
    report = cnnops.convert_(model)
    assert not report.swapped
    assert not report.skipped
    assert str(report) == "0 swapped, 0 left"


def test_the_model_itself() -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    report = cnnops.convert_(layer)
    assert type(layer) is cnnops.nn.Conv2d
    assert report.swapped == [("", torch.nn.Conv2d, cnnops.nn.Conv2d)]
    assert "(the model)" in str(report)


def test_filter() -> None:
    asked: list[str] = []
    shared = torch.nn.Conv2d(4, 4, 1)
    model = torch.nn.ModuleDict(
        {"conv": torch.nn.Conv2d(3, 4, 3), "norm": torch.nn.BatchNorm2d(4), "s1": shared, "s2": shared}
    )

    def accept(name: str, module: torch.nn.Module) -> bool:
        asked.append(name)
        return isinstance(module, torch.nn.Conv2d) and name != "s2"

    report = cnnops.convert_(model, accept)
    assert asked == ["conv", "norm", "s1", "s2"]
    assert [s.name for s in report.swapped] == ["conv"]
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("norm", "filter_fn said no"), ("s1, s2", "filter_fn said no")
    ]  # fmt: skip
    assert [s.name for s in cnnops.convert_(model).swapped] == ["norm", "s1, s2"]
    assert [s.name for s in cnnops.revert_(model, lambda name, _: name == "conv").swapped] == ["conv"]


def test_idempotent() -> None:
    model = UNet()
    assert len(cnnops.convert_(model).swapped) == 6
    again = cnnops.convert_(model)
    assert (again.swapped, again.skipped) == ([], [])
    assert len(cnnops.revert_(model).swapped) == 6
    again = cnnops.revert_(model)
    assert (again.swapped, again.skipped) == ([], [])


def test_report_prints_a_table() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SyncBatchNorm(4))
    report = cnnops.convert_(model)
    assert repr(report) == str(report)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "was", "is", "now"]
    assert lines[2].split() == ["0", "torch.nn.Conv2d", "cnnops.nn.Conv2d"]
    assert lines[3].split()[:3] == ["1", "torch.nn.SyncBatchNorm", "left:"]
    assert lines[-1] == "1 swapped, 1 left"
    assert len({line.index(word) for line, word in zip(lines[2:4], ("cnnops.nn", "left:"), strict=True)}) == 1


def test_revert_leaves_what_torch_does_not_have() -> None:
    model = torch.nn.Sequential(
        cnnops.nn.Conv2d(3, 4, 3, activation="relu"),
        cnnops.nn.Conv2d(4, 4, 3, padding="full"),
        cnnops.nn.Conv2d(4, 4, 3, stride=2, padding="same"),
        cnnops.nn.BatchNorm2d(4, activation="silu"),
        cnnops.nn.MedianPool2d(2),
        cnnops.nn.LocallyConnected2d(4, 4, 6, 3),
        cnnops.nn.Conv2d(4, 4, 3, padding="same"),
    )
    expected = model(x := images())
    report = cnnops.revert_(model)
    assert [s.name for s in report.swapped] == ["6"]
    assert [s.reason for s in report.skipped] == [
        "torch.nn has no activation='relu' in this layer",
        "torch.nn has no padding='full' with stride (1, 1)",
        "torch.nn has no padding='same' with stride (2, 2)",
        "torch.nn has no activation='silu' in this layer",
        "torch.nn has no such layer",
        "torch.nn has no such layer",
    ]
    near(model(x), expected)


@pytest.mark.parametrize("function", [cnnops.convert_, cnnops.revert_])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"'model' must be a torch\.nn\.Module, not list"):
        function([torch.nn.Conv2d(3, 4, 3)])


def test_whole_report_of_a_model() -> None:
    report = cnnops.convert_(ResNet())
    assert len(report.swapped) == 17  # with three ReLUs
    assert not report.skipped
