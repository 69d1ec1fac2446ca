"""Every operator under ``torch.library.opcheck``, and a network of all functions through PyTorch's machinery."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import images, near
from opcheck_samples import SAMPLES
from place import DEVICE
from torch import Tensor

import cnnops
import cnnops.functional as CF
from cnnops._lib import C
from cnnops.ops import _core
from cnnops.ops._core import OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_has_samples(name: str) -> None:
    assert name in SAMPLES, f"add arguments for cnnops::{name} to tests/opcheck_samples.py"
    assert next(SAMPLES[name](), None) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPERATORS if name in SAMPLES])
def test_opcheck(name: str) -> None:
    for args in SAMPLES[name]():
        result = torch.library.opcheck(OPERATORS[name].public, args)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", [name for name in OPERATORS if name in SAMPLES])
def test_operator_looks_the_same_to_every_caller(name: str) -> None:
    """The kernel, its fake, the way around the dispatcher and the public operator agree, in strides too."""
    operator = OPERATORS[name]
    for args in SAMPLES[name]():
        outputs = [operator(*args), operator.public(*args), operator.kernel(*detached(args))]
        fake = operator.public(*(t.to("meta") if isinstance(t, Tensor) else t for t in detached(args)))
        facts = [[(t.shape, t.dtype, t.stride()) for t in flat(out)] for out in (*outputs, fake)]
        assert all(f == facts[0] for f in facts)
        for other in outputs[1:]:
            for got, expected in zip(flat(other), flat(outputs[0]), strict=True):
                assert torch.equal(got, expected)


def detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in args)


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


class Theirs:
    """cnnops.functional's functions, by PyTorch's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def act(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
        y = y if residual is None else y + residual
        return y if activation is None else getattr(F, activation)(y)

    def conv2d(
        self, *args: Any, activation: str | None = None, residual: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return self.act(F.conv2d(*args, **kwargs), activation, residual)

    def batch_norm(
        self, *args: Any, activation: str | None = None, residual: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return self.act(F.batch_norm(*args, **kwargs), activation, residual)

    def median_pool2d(self, x: Tensor, k: int) -> Tensor:
        return x.unfold(2, k, k).unfold(3, k, k).flatten(-2).median(-1).values

    def locally_connected2d(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        r, s = weight.shape[-2:]
        y = torch.einsum("ncpqrs,pqkcrs->nkpq", x.unfold(2, r, 1).unfold(3, s, 1), weight)
        return y + bias[:, None, None]


class Net(torch.nn.Module):
    """[N, 3, 24, 24] to [N, 7]: each function of cnnops.functional at least once."""

    def __init__(self, functions: Any) -> None:
        super().__init__()
        self.f = functions

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64) * 0.3)

        self.stem, self.depthwise, self.wide = parameter(8, 3, 3, 3), parameter(8, 1, 5, 5), parameter(8, 8, 1, 1)
        self.gain, self.shift = torch.nn.Parameter(torch.rand(8, dtype=torch.float64) + 0.5), parameter(8)
        self.up, self.local, self.bias = parameter(8, 4, 2, 2), parameter(4, 4, 6, 4, 3, 3), parameter(6)
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("var", torch.ones(8, dtype=torch.float64))
        self.head = torch.nn.Linear(4 + 4 + 6, 7, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        f = self.f
        x = f.conv2d(x, self.stem, stride=2, padding=1)
        x = f.batch_norm(x, self.mean, self.var, self.gain, self.shift, training=self.training, activation="silu")
        y = f.conv2d(x, self.depthwise, padding="same", groups=8)
        x = f.conv2d(y, self.wide, self.shift, activation="relu", residual=x)
        x = f.max_pool2d(x, 3, 2, 1) + f.avg_pool2d(x, 2)
        x = f.median_pool2d(f.conv_transpose2d(x, self.up, stride=2), 2)
        a, b = f.adaptive_avg_pool2d(x, 1), f.adaptive_max_pool2d(x, 1)
        c = f.locally_connected2d(x, self.local, self.bias)
        return self.head(torch.cat([a.flatten(1), b.flatten(1), c.amax((2, 3))], 1))


def nets() -> tuple[Net, Net]:
    ours, theirs = Net(CF), Net(Theirs())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(n: int = 3) -> Tensor:
    return images(n, torch.float64)


def gradients(net: torch.nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, ...]:
    y = net(x) if call is None else call(x)
    grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    return y, *grads, *(b.clone() for b in net.buffers())


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eager(training: bool, format: torch.memory_format) -> None:
    ours, theirs = (net.train(training) for net in nets())
    x = batch().contiguous(memory_format=format)
    near(gradients(ours, x), gradients(theirs, x))
    with torch.no_grad():
        near(ours(x), theirs(x))


def test_names_of_the_functions_in_use() -> None:
    """The network leaves out no function."""
    used = set(Net.forward.__code__.co_names)
    assert set(CF.__all__) <= used


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile(training: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    ours, theirs = (net.train(training) for net in nets())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 4):
        x = batch(n)
        near(gradients(ours, x, compiled), gradients(theirs, x))
        with torch.no_grad():
            near(compiled(x), theirs(x))


def test_compile_takes_what_a_device_can_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(device: int | None) -> tuple[int, int]:
        return 8, min(C.omp_max_threads(), 0)  # dynamo cannot trace the extension

    monkeypatch.setattr(_core, "_capability", capability)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if _core._capable(0) else x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    ours, theirs = (net.eval() for net in nets())
    program = torch.export.export(ours, (batch(2),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("cnnops.")}
    assert {"conv2d", "avg_pool2d"} <= called
    x = batch(5)
    near(program.module()(x), theirs(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    near(torch.export.load(file).module()(x), theirs(x))
    decomposed = program.run_decompositions()
    near(decomposed.module()(x), theirs(x))


def test_per_sample_gradients() -> None:
    ours, theirs = (net.eval() for net in nets())
    x = batch()

    def per_sample(net: torch.nn.Module) -> Any:
        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x)

    got = per_sample(ours)
    near(got, per_sample(theirs))
    near([g[2] for g in got.values()], gradients(ours, x[2:])[1 : 1 + len(got)])


def test_transforms() -> None:
    ours, theirs = (net.eval() for net in nets())
    x, v = batch(2), batch(2)
    for net in (ours, theirs):
        net.requires_grad_(False)
    near(torch.func.vmap(ours, randomness="error")(x[:, None]), theirs(x)[:, None])
    near(torch.func.jvp(ours, (x,), (v,)), torch.func.jvp(theirs, (x,), (v,)))
    near(torch.func.vjp(ours, x)[1](theirs(x))[0], torch.func.vjp(theirs, x)[1](theirs(x))[0])
    near(torch.func.jacrev(ours)(x[:1]), torch.func.jacrev(theirs)(x[:1]))

    def scalar(net: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda t: net(t).square().sum()

    hessian_product = [
        torch.func.grad(lambda t, net=net: (torch.func.grad(scalar(net))(t) * v).sum())(x) for net in (ours, theirs)
    ]
    near(*hessian_product)


def test_second_derivatives() -> None:
    ours, theirs = nets()
    x = batch(2)
    results = []
    for net in (ours, theirs):
        grads = torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(net.parameters())))
    near(*results, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    ours, theirs = (net.eval() for net in nets())
    x = batch().requires_grad_()
    grads = []
    for net, call in ((ours, lambda t: checkpoint(ours, t, use_reentrant=reentrant)), (theirs, theirs)):
        net.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    near(*grads)


def test_inference_mode() -> None:
    ours, theirs = (net.eval() for net in nets())
    with torch.inference_mode():
        x = batch()
        y = ours(x)
        near(y, theirs(x))
    assert y.is_inference()


def test_autocast() -> None:
    ours, theirs = (net.float() for net in nets())
    x = batch().float()
    outputs = []
    for net in (ours, theirs):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = net.eval()(x)
        y.float().sum().backward()
        outputs.append(y)
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    near(*outputs, 5e-2)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert Net(CF).to("meta")(batch().to("meta")).shape == (3, 7)
    with FakeTensorMode():
        net = Net(CF)
        y = net(torch.empty(3, 3, 24, 24, dtype=torch.float64))
        y.sum().backward()
        assert y.shape == (3, 7)
        assert net.stem.grad.shape == net.stem.shape


def test_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in (torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, groups=8)),) * 2:
        with FlopCounterMode(display=False) as counter:
            model(images())
        counts.append(counter.get_total_flops())
        cnnops.convert_(model)
    assert counts[0] == counts[1] > 0
