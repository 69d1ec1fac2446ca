"""patch_aten: what it routes, what it leaves, and that it ends."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, images, near, step
from place import DEVICE
from torch import Tensor

import cnnops
import cnnops.functional as CF

NAMES = ("conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
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

    for name in NAMES:
        monkeypatch.setattr(CF, name, counting(name, getattr(CF, name)))
    return counter


def x() -> Tensor:
    return torch.linspace(-3, 3, 2 * 4 * 9 * 10).sin().view(2, 4, 9, 10)


def w(k: int = 4) -> Tensor:
    return torch.linspace(-1, 1, 4 * k * 9).cos().view(4, k, 3, 3)


def statistics() -> dict[str, Tensor]:
    return dict(running_mean=torch.arange(4.0), running_var=torch.arange(1.0, 5.0))


ROUTED: list[tuple[str, Callable[[], Any]]] = [
    ("conv2d", lambda: F.conv2d(x(), w())),
    ("conv2d", lambda: torch.conv2d(x(), w(1), groups=4, padding="same", dilation=[2, 1])),
    ("conv2d", lambda: F.conv2d(input=x(), weight=w(), bias=torch.ones(4), stride=(2, 1), padding=1)),
    ("conv2d", lambda: F.conv2d(x()[0], w(), None, 1, "valid")),
    ("conv_transpose2d", lambda: F.conv_transpose2d(x(), w(), stride=2, padding=1, output_padding=1)),
    ("conv_transpose2d", lambda: torch.conv_transpose2d(x(), w(), None, 1, 0, 0, 1, 2)),
    ("max_pool2d", lambda: F.max_pool2d(x(), 3, 2, 1)),
    ("max_pool2d", lambda: F.max_pool2d(x(), (2, 3), ceil_mode=True, return_indices=True)),
    ("max_pool2d", lambda: F.max_pool2d_with_indices(x(), 2)),
    ("max_pool2d", lambda: torch.max_pool2d(x(), 2, (), 0, 2)),
    ("max_pool2d", lambda: torch._C._nn.max_pool2d_with_indices(x(), [2, 2])),
    ("avg_pool2d", lambda: F.avg_pool2d(x(), 3, 2, 1, True, False)),
    ("avg_pool2d", lambda: F.avg_pool2d(x(), 2, divisor_override=3)),
    ("avg_pool2d", lambda: torch._C._nn.avg_pool2d(x(), [2, 2], [])),
    ("adaptive_avg_pool2d", lambda: F.adaptive_avg_pool2d(x(), (3, None))),
    ("adaptive_avg_pool2d", lambda: torch._C._nn.adaptive_avg_pool2d(x(), [3, 2])),
    ("adaptive_max_pool2d", lambda: F.adaptive_max_pool2d(x(), 3)),
    ("adaptive_max_pool2d", lambda: F.adaptive_max_pool2d(x(), 3, return_indices=True)),
    ("adaptive_max_pool2d", lambda: F.adaptive_max_pool2d_with_indices(x(), (2, 3))),
    ("adaptive_max_pool2d", lambda: torch._C._nn.adaptive_max_pool2d(x(), [2, 3])),
    ("batch_norm", lambda: F.batch_norm(x(), **statistics())),
    ("batch_norm", lambda: F.batch_norm(x(), None, None, torch.arange(4.0), torch.ones(4), True, 0.2, 1e-3)),
    ("batch_norm", lambda: torch.batch_norm(x(), None, torch.ones(4), *statistics().values(), True, 0.1, 1e-5, False)),
    ("conv2d", lambda: torch.nn.Conv2d(4, 2, 1)(x()).shape),
]  # fmt: skip
LEFT: list[Callable[[], Any]] = [
    lambda: F.conv1d(x()[0], torch.ones(2, 9, 3)),
    lambda: F.avg_pool1d(x()[0], 2),
    lambda: F.max_pool3d(x(), 2),
    lambda: F.avg_pool2d(x(), 2, out=torch.empty(2, 4, 4, 5)),  # type: ignore[call-overload]
    lambda: torch.ops.aten.conv2d(x(), w()),
    lambda: F.instance_norm(x()),
    lambda: torch.batch_norm(x()[:1, :, :1, :1], None, None, None, None, True, 0.1, 1e-5, False),
    lambda: torch.batch_norm(x(), None, None, None, None, True, 0.1, 0.0, False),
]


@pytest.mark.parametrize(("name", "call"), ROUTED)
def test_routed(name: str, call: Callable[[], Any], calls: Counter[str]) -> None:
    expected = call()
    assert not calls
    with cnnops.patch_aten():
        got = call()
    assert calls == {name: 1}
    if isinstance(expected, torch.Size):
        assert got == expected
        return
    near(got, expected)
    call()
    assert calls == {name: 1}


@pytest.mark.parametrize("call", LEFT)
def test_left(call: Callable[[], Any], calls: Counter[str]) -> None:
    expected = call()
    with cnnops.patch_aten():
        got = call()
    assert not calls
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_running_statistics_are_updated() -> None:
    a, b = statistics(), statistics()
    F.batch_norm(x(), **a, training=True)
    with cnnops.patch_aten():
        F.batch_norm(x(), **b, training=True)
    near(b, a)


class Functional(torch.nn.Module):
    """A model that calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 3, 3, 3))
        self.up = torch.nn.Parameter(torch.randn(6, 4, 2, 2))
        self.gain = torch.nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, t: Tensor) -> Tensor:
        y = F.conv2d(t, self.weight, stride=2, padding=1)
        y = F.relu(F.batch_norm(y, self.mean, self.var, self.gain, training=self.training))
        y = F.max_pool2d(y, 3, 2, 1) + F.avg_pool2d(y, 2)
        y = F.conv_transpose2d(y, self.up, stride=2)
        return torch.cat([F.adaptive_avg_pool2d(y, 2).flatten(1), F.adaptive_max_pool2d(y, 1).flatten(1)], 1)


ALL: dict[str, Callable[[], torch.nn.Module]] = {**MODELS, "functional": Functional}


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ALL)
def test_models(name: str, training: bool, backward_inside: bool, calls: Counter[str]) -> None:
    plain = ALL[name]().double().train(training)
    patched = copy.deepcopy(plain)
    data = images(dtype=torch.float64)
    expected = step(plain, data)
    if backward_inside:
        with cnnops.patch_aten():
            got = step(patched, data)
    else:
        t = data.clone().requires_grad_()
        with cnnops.patch_aten():
            y = patched(t)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        got = (y.detach(), t.grad, {n: p.grad for n, p in patched.named_parameters() if p.grad is not None},
               dict(patched.named_buffers()))  # fmt: skip
    near(got, expected)
    assert calls["conv2d"] > 0
    assert "cnnops" not in type(next(iter(patched.modules()))).__module__


@pytest.mark.parametrize("name", ALL)
def test_no_grad_inference_mode_and_autocast(name: str) -> None:
    model = ALL[name]().eval()
    data = images()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected = model(data)
            with cnnops.patch_aten():
                near(model(data), expected)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        expected = model(data)
        with cnnops.patch_aten():
            got = model(data)
    near(got, expected, 5e-2)
    with cnnops.patch_aten(), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(model(data), got)


def test_ends_with_the_block(calls: Counter[str]) -> None:
    with cnnops.patch_aten():
        F.conv2d(x(), w())
    F.conv2d(x(), w())
    assert calls["conv2d"] == 1
    assert not torch.overrides._get_current_function_mode_stack()


def test_ends_with_an_exception(calls: Counter[str]) -> None:
    with pytest.raises(KeyError), cnnops.patch_aten():
        raise KeyError
    with pytest.raises(RuntimeError, match="channels"), cnnops.patch_aten():
        F.conv2d(x(), w(2))
    assert not torch.overrides._get_current_function_mode_stack()
    calls.clear()
    F.conv2d(x(), w())
    assert not calls


def test_nested(calls: Counter[str]) -> None:
    with cnnops.patch_aten():
        with cnnops.patch_aten():
            F.conv2d(x(), w())
            assert calls["conv2d"] == 1
            F.max_pool2d(torch.arange(64, device="cpu").view(1, 1, 8, 8), 2)  # PyTorch's own, not routed a second time
            assert calls["max_pool2d"] == 1
            with pytest.raises(KeyError), cnnops.patch_aten():
                raise KeyError
        F.conv2d(x(), w())
        assert calls["conv2d"] == 2
    F.conv2d(x(), w())
    assert calls["conv2d"] == 2


def test_as_a_decorator(calls: Counter[str]) -> None:
    @cnnops.patch_aten()
    def forward() -> Tensor:
        return F.conv2d(x(), w())

    forward()
    forward()
    assert calls["conv2d"] == 2
    F.conv2d(x(), w())
    assert calls["conv2d"] == 2


def test_holds_for_its_thread(calls: Counter[str]) -> None:
    entered, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def other() -> None:
        try:
            assert entered.wait(30)
            F.conv2d(x(), w())
            assert not calls
            with cnnops.patch_aten():
                F.conv2d(x(), w())
            assert calls["conv2d"] == 1
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with cnnops.patch_aten():
        entered.set()
        assert done.wait(60)
        F.conv2d(x(), w())
    thread.join()
    assert not failures
    assert calls["conv2d"] == 2


def test_beside_other_modes(calls: Counter[str]) -> None:
    from torch.overrides import TorchFunctionMode

    seen: list[Any] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    expected = F.conv2d(x(), w())
    for outer, inner in ((Log, cnnops.patch_aten), (cnnops.patch_aten, Log)):
        calls.clear()
        with outer(), inner():
            near(F.conv2d(x(), w()), expected)
        assert calls["conv2d"] == 1
    assert torch.conv2d in seen
    with torch.device("cpu"), cnnops.patch_aten():  # a mode of torch's own
        near(F.conv2d(x(), w()), expected)


ODD: list[Callable[[], Any]] = [
    lambda: F.max_pool2d(torch.arange(64).view(1, 1, 8, 8), 2),
    lambda: F.avg_pool2d(torch.arange(64).view(1, 1, 8, 8), 2),
    lambda: F.conv2d(torch.arange(64).view(1, 1, 8, 8), torch.ones(1, 1, 3, 3, dtype=torch.int64)),
    lambda: F.conv2d(torch.ones(1, 1, 8, 8, dtype=torch.complex64), torch.ones(1, 1, 3, 3, dtype=torch.complex64)),
    lambda: F.conv2d(x().half(), w().half()),
    lambda: F.conv2d(x(), w().double()),
    lambda: F.conv2d(x().to("meta"), w().to("meta")),
    lambda: F.batch_norm(torch.ones(4, 3), torch.zeros(3), torch.ones(3)),
    lambda: F.batch_norm(torch.ones(4, 3, 5), torch.zeros(3), torch.ones(3)),
    lambda: F.batch_norm(torch.ones(1, 3, 1, 1), None, None, training=True),
    lambda: F.adaptive_avg_pool2d(torch.arange(64).view(1, 1, 8, 8), 2),
    lambda: F.max_pool2d(x(), 0),
    lambda: F.max_pool2d(x(), 2, padding=2),
    lambda: F.avg_pool2d(x(), 20),
    lambda: F.conv2d(x(), w(), stride=0),
    lambda: F.conv2d(x(), w(), padding="full"),
    lambda: F.conv2d(x(), w(), stride=2, padding="same"),
    lambda: F.conv2d(x(), w(), activation="relu"),  # type: ignore[call-overload]
    lambda: F.batch_norm(x(), **statistics(), activation="relu"),  # type: ignore[call-arg]
    lambda: F.conv2d(x()),  # type: ignore[call-overload]
    lambda: F.batch_norm(x(), None, None, training=True, momentum=None),  # type: ignore[arg-type]
    lambda: F.batch_norm(x(), **statistics(), training=True, eps=-1.0),
]


@pytest.mark.parametrize("call", ODD, ids=range(len(ODD)))
def test_odd_calls_end_as_in_torch(call: Callable[[], Any]) -> None:
    try:
        expected = call()
    except Exception as error:
        with (
            pytest.raises(next(k for k in (TypeError, ValueError, RuntimeError) if isinstance(error, k))),
            cnnops.patch_aten(),
        ):
            call()
        return
    with cnnops.patch_aten():
        got = call()
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    if got.device.type != "meta":
        assert torch.allclose(got, expected, rtol=1e-2)


def test_tensor_subclasses_have_the_first_say(calls: Counter[str]) -> None:
    seen: list[Any] = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    with cnnops.patch_aten():
        F.conv2d(x().as_subclass(Own), w())
    assert torch.conv2d in seen
    assert not calls


def test_parameters_are_plain_tensors(calls: Counter[str]) -> None:
    with cnnops.patch_aten():
        F.conv2d(x(), torch.nn.Parameter(w()))
    assert calls["conv2d"] == 1


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), cnnops.patch_aten():
        assert F.conv2d(torch.empty(2, 4, 9, 10), torch.empty(4, 4, 3, 3)).shape == (2, 4, 7, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["functional", "unet"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    model = ALL[name]().eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    data = images()
    with torch.no_grad():
        expected = model(data)
        near(compiled(data), expected)
        with cnnops.patch_aten():
            near(compiled(data), expected)
        near(compiled(data), expected)
    assert ["cnnops" in code for code in graphs] == [False, True]


def test_vmap_and_grad(calls: Counter[str]) -> None:
    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return F.conv2d(sample[None], weight, padding=1).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = per_sample(w().double(), x().double())
    with cnnops.patch_aten():
        near(per_sample(w().double(), x().double()), expected)
    assert calls["conv2d"] > 0


def test_converted_models_inside() -> None:
    model = MODELS["unet"]()
    data = images()
    cnnops.convert_(model)
    expected = model(data)
    with cnnops.patch_aten():
        near(model(data), expected)
