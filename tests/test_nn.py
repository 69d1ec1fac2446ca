"""The layers of cnnops.nn, each beside torch.nn's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import near, step
from place import DEVICE
from torch import Tensor

import cnnops
from cnnops import nn

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TWINS = [
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=3)),
    ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), bias=False)),
    ("Conv2d", dict(in_channels=4, out_channels=8, kernel_size=(2, 3), dilation=2, groups=2, padding="same")),
    ("Conv2d", dict(in_channels=4, out_channels=4, kernel_size=3, groups=4, padding="valid")),
    *[
        ("Conv2d", dict(in_channels=4, out_channels=6, kernel_size=(4, 3), padding=p, stride=s, padding_mode=mode))
        for mode in ("reflect", "replicate", "circular")
        for p, s in (((2, 1), 2), ("same", 1))
    ],
    ("ConvTranspose2d", dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1, output_padding=1)),
    ("ConvTranspose2d", dict(in_channels=4, out_channels=6, kernel_size=(3, 2), groups=2, dilation=2, bias=False)),
    ("MaxPool2d", dict(kernel_size=3, stride=2, padding=1)),
    ("MaxPool2d", dict(kernel_size=(2, 3), dilation=2, ceil_mode=True)),
    ("AvgPool2d", dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)),
    ("AvgPool2d", dict(kernel_size=(2, 3), divisor_override=4)),
    ("AdaptiveAvgPool2d", dict(output_size=(3, None))),
    ("AdaptiveAvgPool2d", dict(output_size=1)),
    ("AdaptiveMaxPool2d", dict(output_size=(None, 2))),
    ("BatchNorm2d", dict(num_features=4)),
    ("BatchNorm2d", dict(num_features=4, momentum=None, eps=1e-3)),
    ("BatchNorm2d", dict(num_features=4, affine=False, momentum=0.3)),
    ("BatchNorm2d", dict(num_features=4, track_running_stats=False)),
    ("ReLU", {}),
    ("ReLU6", {}),
    ("SiLU", {}),
    ("Hardswish", {}),
    ("GELU", {}),
    ("GELU", dict(approximate="tanh")),
]
ACTIVATIONS = [(name, inplace) for name in ("ReLU", "ReLU6", "SiLU", "Hardswish") for inplace in (False, True)]


def name_of(case: Any) -> str:
    return f"{case[0]}({', '.join(f'{k}={v}' for k, v in case[1].items())})" if isinstance(case, tuple) else str(case)


def twins(name: str, options: dict[str, Any], **more: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's layer and this package's, in one state."""
    theirs = getattr(torch.nn, name)(**options, **more)
    for tensor in theirs.state_dict().values():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn_like(tensor).abs() + 0.1)
    ours = getattr(nn, name)(**options, **more)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_twin_computes_the_same(case: tuple[str, dict], dtype: torch.dtype, format: str) -> None:
    more = {"dtype": dtype} if case[0].startswith(("Conv", "Batch")) else {}
    theirs, ours = twins(*case, **more)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    for mode in (True, True, False):
        x = torch.randn(3, 4, 9, 10, dtype=dtype).contiguous(memory_format=FORMATS[format])
        theirs.train(mode)
        ours.train(mode)
        y = ours(x)
        reference = theirs(x)
        assert y.stride() == reference.stride()
        near(y, reference)
        near(step(ours, x), step(theirs, x))
    near(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_state_goes_both_ways(case: tuple[str, dict]) -> None:
    theirs, ours = twins(*case)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.add_(1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value)


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_layers_are_copied_and_pickled(case: tuple[str, dict]) -> None:
    _, layer = twins(*case)
    layer.eval()
    x = torch.randn(2, 4, 9, 10)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("case", [c for c in TWINS if c[0] != "BatchNorm2d"], ids=name_of)
def test_images_without_a_batch(case: tuple[str, dict]) -> None:
    theirs, ours = twins(*case)
    x = torch.randn(4, 9, 10)
    near(ours(x), theirs(x))


def test_initial_weights_are_those_of_torch() -> None:
    for name, options in TWINS:
        torch.manual_seed(3)
        theirs = getattr(torch.nn, name)(**options).state_dict()
        torch.manual_seed(3)
        ours = getattr(nn, name)(**options).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("padding", "sides"),
    # [8, 9] with kernel (3, 4), stride (2, 3), dilation (1, 2): ceil gives 4 x 3; rows (4-1)*2+3-8 = 1: 0 + 1,
    # columns (3-1)*3+7-9 = 4: 2 + 2. F.pad takes left, right, top, bottom.
    [("same", (2, 2, 0, 1)), ("full", (6, 6, 2, 2)), ("valid", (0, 0, 0, 0))],
)
def test_padding_words(padding: str, sides: tuple[int, ...], mode: str) -> None:
    layer = nn.Conv2d(3, 5, (3, 4), (2, 3), padding, (1, 2), padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    padded = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    y = layer(x)
    near(y, F.conv2d(padded, layer.weight, layer.bias, (2, 3), 0, (1, 2)))
    if padding == "same":
        assert y.shape[2:] == (4, 3)
    assert f"padding={padding}" in repr(layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", None])
def test_activation_and_residual(activation: str | None, training: bool) -> None:
    function = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, None: lambda y: y}[activation]
    x, residual = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    for layer, plain in (
        (nn.Conv2d(4, 4, 3, padding=1, activation=activation), torch.nn.Conv2d(4, 4, 3, padding=1)),
        (nn.BatchNorm2d(4, activation=activation), torch.nn.BatchNorm2d(4)),
    ):
        layer.double().train(training)
        plain.double().train(training)
        plain.load_state_dict(layer.state_dict())
        near(layer(x), function(plain(x)))
        y, expected = layer(x, residual), function(plain(x) + residual)
        near(y, expected)
        near(
            torch.autograd.grad(y.square().sum(), (x, residual, *layer.parameters())),
            torch.autograd.grad(expected.square().sum(), (x, residual, *plain.parameters())),
        )
        assert (f"activation={activation}" in repr(layer)) == (activation is not None)
        assert vars(layer).get("activation") == activation


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.BatchNorm2d])
def test_unknown_activation(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"activation must be None or one of .*'swish'"):
        layer(*[4, 4, 3][: 3 if layer is nn.Conv2d else 1], activation="swish")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_refused_batch_leaves_batch_norm_untouched(momentum: float | None) -> None:
    layer = nn.BatchNorm2d(4, momentum=momentum)
    layer(torch.randn(2, 4, 3, 3))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for bad in (torch.randn(1, 4, 1, 1), torch.randn(2, 5, 3, 3), torch.randn(2, 4, 3)):
        with pytest.raises((ValueError, RuntimeError)):
            layer(bad)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_median_pool() -> None:
    layer = nn.MedianPool2d((3, 2), stride=(1, 2))
    assert "kernel_size=(3, 2), stride=(1, 2), padding=0, dilation=1, ceil_mode=False" in repr(layer)
    assert layer.state_dict() == {}
    x = torch.randn(2, 3, 7, 8)
    windows = x.unfold(2, 3, 1).unfold(3, 2, 2).flatten(-2)
    assert torch.equal(layer(x), windows.median(-1).values)
    assert torch.equal(nn.MedianPool2d(2)(x), nn.MedianPool2d(2, 2)(x))


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (dict(kernel_size=3), "zeros"),
        (dict(kernel_size=(2, 3), stride=(1, 2), padding=1, bias=False), "zeros"),
        (dict(kernel_size=(2, 3), stride=(2, 1), padding="same"), "zeros"),
        (dict(kernel_size=3, padding="same", dilation=2), "reflect"),
        (dict(kernel_size=2, padding="full"), "circular"),
        (dict(kernel_size=4, padding=(1, 2), stride=3), "replicate"),
    ],
    ids=str,
)
def test_locally_connected(options: dict[str, Any], mode: str) -> None:
    """With the same filter everywhere it is a convolution."""
    local = nn.LocallyConnected2d(3, 5, (7, 9), **options, padding_mode=mode, dtype=torch.float64)
    shared = nn.Conv2d(3, 5, **options, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    expected = shared(x)
    assert local.weight.shape == (*expected.shape[2:], 5, 3, *shared.kernel_size)
    with torch.no_grad():
        local.weight.copy_(shared.weight.expand_as(local.weight))
        if local.bias is not None:
            assert local.bias.shape == expected.shape[1:]
            local.bias.copy_(shared.bias[:, None, None].expand_as(local.bias))
    before = local(x)
    near(before, expected)
    near(local(x[0]), expected[0])
    # ... and one position's own filter changes that position alone.
    with torch.no_grad():
        local.weight[1, 2, 3] += 1
    assert (local(x) != before).nonzero()[:, 1:].unique(dim=0).tolist() == [[3, 1, 2]]
    twin = pickle.loads(pickle.dumps(local))
    twin.load_state_dict(copy.deepcopy(local).state_dict(), strict=True)
    assert torch.equal(twin(x), local(x))


def test_locally_connected_starts_like_a_convolution() -> None:
    layer = nn.LocallyConnected2d(3, 8, 9, 3)
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= 27**-0.5
        assert abs(float(parameter.detach().std()) - (27 * 3) ** -0.5) < 0.01


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: nn.Conv2d(3, 8, 3, padding="most"), ValueError, "most"),
        (lambda: nn.Conv2d(3, 8, 3, padding_mode="mirror"), ValueError, "mirror"),
        (lambda: nn.Conv2d(3, 8, 3, groups=2), ValueError, "groups"),
        (lambda: nn.ConvTranspose2d(3, 8, 3, padding_mode="reflect"), ValueError, "zeros"),
        (lambda: nn.LocallyConnected2d(3, 8, 5, 7), ValueError, "larger than"),
        (lambda: nn.LocallyConnected2d(3, 8, 5, 3, stride=0), ValueError, "positive"),
        (lambda: nn.LocallyConnected2d(0, 8, 5, 3), ValueError, "in_channels"),
        (lambda: nn.LocallyConnected2d(3, 8, 5, 3, padding_mode="mirror"), ValueError, "mirror"),
        (lambda: nn.LocallyConnected2d(3, 8, 5, 3, padding="most"), RuntimeError, "most"),
        (lambda: nn.LocallyConnected2d(3, 8, 5, "3"), TypeError, "kernel_size"),
    ],
)
def test_bad_constructions(build: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


# What the kernels do not take goes where PyTorch takes it, or to the error that PyTorch gives.
ODD = {
    "int64": lambda: torch.arange(360).view(1, 4, 9, 10),
    "uint8": lambda: torch.arange(360).view(1, 4, 9, 10).to(torch.uint8),
    "bool": lambda: torch.ones(1, 4, 9, 10, dtype=torch.bool),
    "complex64": lambda: torch.randn(1, 4, 9, 10, dtype=torch.complex64),
    "bfloat16": lambda: torch.randn(1, 4, 9, 10, dtype=torch.bfloat16),
    "float16": lambda: torch.randn(1, 4, 9, 10, dtype=torch.float16),
    "meta": lambda: torch.randn(1, 4, 9, 10, device="meta"),
    "sparse": lambda: torch.randn(1, 4, 9, 10).to_sparse(),
    "empty batch": lambda: torch.randn(0, 4, 9, 10),
    "two dimensions": lambda: torch.randn(9, 10),
    "five dimensions": lambda: torch.randn(1, 1, 4, 9, 10),
    "other channels": lambda: torch.randn(1, 3, 9, 10),
    "float64": lambda: torch.randn(1, 4, 9, 10, dtype=torch.float64),
    "empty image": lambda: torch.randn(1, 4, 0, 10),
    "one pixel": lambda: torch.randn(1, 4, 1, 1),
    "a list": lambda: [1.0, 2.0],
    "no tensor": lambda: None,
}


def outcome(function: Any, *args: Any) -> Any:
    try:
        with torch.no_grad():
            return function(*args)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError) as error:
        return error


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("cast", [False, True], ids=["float32 layer", "layer cast to the input"])
@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_odd_inputs_end_as_in_torch(case: tuple[str, dict], kind: str, cast: bool) -> None:
    theirs, ours = twins(*case)
    x = ODD[kind]()
    if cast and isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex):
        theirs, ours = (layer.to(device=x.device, dtype=x.dtype) for layer in (theirs, ours))
    expected, got = outcome(theirs, x), outcome(ours, x)
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"torch raises {expected!r}, cnnops gives {got.shape}"
        kinds = (RuntimeError, ValueError, TypeError)
        if isinstance(expected, kinds):
            kinds = tuple(k for k in kinds if isinstance(expected, k))
        else:  # an IndexError or AttributeError that PyTorch ran into
            kinds += (type(expected),)
        assert isinstance(got, kinds), f"torch raises {expected!r}, cnnops {got!r}"
        return
    assert isinstance(got, Tensor), f"torch gives {expected.shape}, cnnops raises {got!r}"
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    if kind != "meta":
        assert got.layout == expected.layout
        if got.layout is torch.sparse_coo:
            got, expected = got.to_dense(), expected.to_dense()
        if got.dtype.is_complex:
            got, expected = torch.view_as_real(got), torch.view_as_real(expected)
        near(got, expected, 2e-2 if got.dtype in (torch.bfloat16, torch.float16) else None)


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_fake_tensors(case: tuple[str, dict]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    theirs, ours = twins(*case)
    ours.eval()  # (in training, momentum=None reads a number from a tensor)
    theirs.eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 4, 9, 10).to(memory_format=torch.channels_last)
        y, reference = ours(x), theirs(x)
    assert (y.shape, y.dtype, y.stride()) == (reference.shape, reference.dtype, reference.stride())


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_meta_layers(case: tuple[str, dict]) -> None:
    with torch.device("meta"):
        layer = getattr(nn, case[0])(**case[1])
        reference = getattr(torch.nn, case[0])(**case[1])
        layer.eval()  # (in training, momentum=None reads a number from a tensor)
        reference.eval()
        x = torch.randn(2, 4, 9, 10)
        assert layer(x).shape == reference(x).shape
        assert layer(x).device.type == "meta"
    materialized = layer.to_empty(device=DEVICE)
    materialized.load_state_dict(getattr(torch.nn, case[0])(**case[1]).state_dict())
    assert materialized(torch.randn(2, 4, 9, 10)).device.type == DEVICE


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_tensor_subclasses_that_know_only_pytorch(case: tuple[str, dict]) -> None:
    class Picky(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "cnnops" in str(func):
                raise NotImplementedError(func)
            return super().__torch_function__(func, types, args, kwargs)

    _, layer = twins(*case)
    layer.eval()
    x = torch.randn(2, 4, 9, 10)
    y = layer(x.as_subclass(Picky))
    assert type(y) is Picky
    near(y.as_subclass(Tensor), layer(x))


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_fx_sees_leaves(case: tuple[str, dict]) -> None:
    _, layer = twins(*case)
    model = torch.nn.Sequential(layer).eval()
    graph = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in graph.graph.nodes][1] == ("call_module", "0")
    x = torch.randn(2, 4, 9, 10)
    assert torch.equal(graph(x), model(x))


def test_fx_records_further_arguments() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, activation="relu")
            self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)
            self.median = nn.MedianPool2d(3)
            self.local = nn.LocallyConnected2d(4, 2, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.local(self.median(self.up(self.conv(x, x), output_size=(24, 24))))

    model = Net()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 4, 11, 11)
    assert torch.equal(graph(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_jit_trace_records_pytorch(case: tuple[str, dict]) -> None:
    theirs, ours = twins(*case)
    traced = torch.jit.trace(ours.eval(), torch.randn(2, 4, 9, 10))
    x = torch.randn(2, 4, 9, 10)
    near(traced(x), theirs.eval()(x))


@pytest.mark.parametrize("case", TWINS, ids=name_of)
def test_autocast_is_that_of_torch(case: tuple[str, dict]) -> None:
    theirs, ours = twins(*case)
    x = torch.randn(2, 4, 9, 10, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, reference = ours(x), theirs(x)
    near(y, reference, 2e-2)
    near(*(torch.autograd.grad(out.float().square().sum(), x)[0] for out in (y, reference)), 3e-2)


def test_return_indices() -> None:
    x = torch.randn(2, 4, 9, 10)
    for name, options in (("MaxPool2d", dict(kernel_size=2)), ("AdaptiveMaxPool2d", dict(output_size=3))):
        theirs, ours = twins(name, options, return_indices=True)
        for got, expected in zip(ours(x), theirs(x), strict=True):
            assert torch.equal(got, expected)
            assert got.dtype == expected.dtype


def test_names() -> None:
    assert cnnops.nn is nn
    classes = {
        name
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and kind.__module__ == "cnnops.nn" and name[0] != "_"
    }
    assert set(nn.__all__) == classes


# ---- Activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "inplace"), [*ACTIVATIONS, ("GELU", None)])
def test_large_activations_are_pytorchs_bit_for_bit(
    name: str, inplace: bool | None, dtype: torch.dtype, format: str
) -> None:
    options = {} if inplace is None else {"inplace": inplace}
    x = (4 * torch.randn(2, 32, 33, 35)).to(dtype).contiguous(memory_format=FORMATS[format])
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    dy = torch.randn_like(x)
    results = []
    for layer in (getattr(torch.nn, name)(**options), getattr(nn, name)(**options)):
        leaf = x.clone().requires_grad_()
        before = leaf * 1  # in place is for what is no leaf
        y = layer(before)
        assert (y is before) == bool(inplace)
        (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        with torch.no_grad():
            plain = layer(x.clone())
        results.append((y, dx, before, plain))
        assert dx.stride() == x.stride() == y.stride()
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "inplace"), ACTIVATIONS)
def test_results_and_gradients_of_large_activations_are_pooled(name: str, inplace: bool) -> None:
    def blocks() -> int:
        return sum(cnnops.memory.stats()[key] for key in ("hits", "misses"))

    layer, leaf = getattr(nn, name)(inplace=inplace), torch.randn(2, 32, 64, 64, requires_grad=True)
    x = leaf * 1
    start = blocks()
    y = layer(x)
    assert blocks() == start + (not inplace or name in ("SiLU", "Hardswish"))  # these save a copy
    start = blocks()
    torch.autograd.grad(y, leaf, leaf.detach())
    assert blocks() == start + 1


@pytest.mark.parametrize(("name", "inplace"), ACTIVATIONS)
def test_second_derivatives_of_large_activations(name: str, inplace: bool) -> None:
    layer, theirs = getattr(nn, name)(inplace=inplace), getattr(torch.nn, name)(inplace=inplace)
    x = torch.randn(2, 16, 33, 35, dtype=torch.float64)
    found = []
    for act in (layer, theirs):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(act(leaf * 1).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1])


def test_in_place_activations_refuse_what_pytorch_refuses() -> None:
    leaf = torch.randn(2, 16, 64, 64, requires_grad=True)
    for layer in (nn.ReLU(inplace=True), nn.SiLU(inplace=True)):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            layer(leaf)
        whole = leaf * 1
        half = layer(whole[:1])  # a view: its base changes with it
        assert torch.equal(whole[:1], half)
        half.sum().backward()
    relu = nn.ReLU()
    saved = leaf * 1
    y = relu(saved)
    saved.zero_()  # relu saves its result alone
    y.sum().backward()
    silu = nn.SiLU()
    saved = leaf * 1
    y = silu(saved)
    saved.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
