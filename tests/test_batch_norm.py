"""batch_norm: values, gradients, memory formats, running statistics, errors, and what torch wants of an operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from place import DEVICE
from torch import Tensor
from torch.autograd import forward_ad

from cnnops._lib import C
from cnnops.functional import batch_norm
from cnnops.ops import _activation

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(5, 6), (4, 3, 7), (2, 3, 9, 11), (3, 37, 5, 4), (2, 5, 3, 4, 2)]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def composed(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool,
    momentum: float = 0.1, eps: float = 1e-5, activation: str | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return _activation.apply(y if residual is None else y + residual, _activation.INDEX[activation])


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.detach().abs().max()) + 1
    torch.testing.assert_close(got.double(), expected.double(), atol=TOLERANCE[dtype] * scale, rtol=0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [(None, False), ("relu", False), ("relu", True), ("silu", True)]
)
def test_as_pytorch(
    dtype: torch.dtype, shape: tuple[int, ...], training: bool, activation: str | None, with_residual: bool
) -> None:
    c = shape[1]
    inputs = [torch.randn(shape) * 2 + 1, torch.rand(c) + 0.5, torch.randn(c)]
    inputs += [torch.randn(shape)] if with_residual else []
    mean, var, dy = torch.randn(c), torch.rand(c) + 0.5, torch.randn(shape).to(dtype)
    mine = [t.to(dtype).requires_grad_() for t in inputs]
    truth = [t.detach().double().requires_grad_() for t in mine]
    stats = [t.to(dtype) for t in (mean, var)]
    true_stats = [t.double() for t in stats]
    y = batch_norm(
        mine[0],
        *stats,
        *mine[1:3],
        training,
        0.3,
        1e-3,
        activation=activation,
        residual=mine[3] if with_residual else None,
    )
    expected = composed(
        truth[0], *true_stats, *truth[1:3], training, 0.3, 1e-3, activation, truth[3] if with_residual else None
    )
    assert y.dtype == dtype
    assert y.shape == shape
    assert y.stride() == F.batch_norm(mine[0], *stats, *mine[1:3], False).stride()
    close(y, expected, dtype)
    for got, right in zip(stats, true_stats, strict=True):
        close(got, right, dtype)
    grads = torch.autograd.grad(y, mine, dy)
    for got, right in zip(grads, torch.autograd.grad(expected, truth, dy.double()), strict=True):
        assert got.dtype == dtype
        close(got, right, dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 3, 5, 4).transpose(2, 3),
    "batch and channels swapped": lambda: torch.randn(3, 2, 4, 5).transpose(0, 1),
    "every other row": lambda: torch.randn(2, 3, 8, 5)[:, :, ::2],
    "every other row, channels_last": lambda: torch.randn(2, 3, 8, 5).contiguous(memory_format=torch.channels_last)[
        :, :, ::2
    ],
    "expanded": lambda: torch.randn(1, 3, 4, 5).expand(2, 3, 4, 5),
    "one pixel, channels_last": lambda: torch.randn(5, 3, 1, 1).contiguous(memory_format=torch.channels_last),
    "one channel, channels_last": lambda: torch.randn(2, 1, 4, 5).contiguous(memory_format=torch.channels_last),
    "rank 2 transposed": lambda: torch.randn(3, 5).t(),
    "rank 3 transposed": lambda: torch.randn(2, 4, 3).transpose(1, 2),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
    "rank 6": lambda: torch.randn(2, 3, 2, 2, 3, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_strides_as_pytorch(layout: str, training: bool) -> None:
    x = LAYOUTS[layout]().detach().requires_grad_()
    stats = (torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
    y, expected = (f(x, *stats, training=training) for f in (batch_norm, F.batch_norm))
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (dx,), (right,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    assert dx.stride() == right.stride()
    torch.testing.assert_close(dx, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_float32_parameters_beside_16_bit_input(half: torch.dtype, training: bool) -> None:
    x = torch.randn(4, 3, 5, 6).to(half).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)
    stats, other = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    y = batch_norm(x, *stats, weight, bias, training)
    expected = F.batch_norm(x, *other, weight, bias, training)
    assert y.dtype == half
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(stats, other)
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert [g.dtype for g in grads] == [half, torch.float32, torch.float32]


@pytest.mark.parametrize(("with_weight", "with_bias", "with_stats"), list(itertools.product([True, False], repeat=3)))
def test_each_vector_may_be_missing(with_weight: bool, with_bias: bool, with_stats: bool) -> None:
    x, dy = leaf(3, 4, 5, 6), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    weight, bias = leaf(4) if with_weight else None, leaf(4) if with_bias else None
    stats, other = ([leaf(4).detach(), leaf(4).detach().exp()] if with_stats else [None, None] for _ in range(2))
    if with_stats:
        other = [s.clone() for s in stats]
    leaves = [t for t in (x, weight, bias) if t is not None]
    y, expected = batch_norm(x, *stats, weight, bias, True), F.batch_norm(x, *other, weight, bias, True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(stats, other)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_mean_keeps_its_digits(format: torch.memory_format) -> None:
    x = (torch.randn(8, 5, 40, 40) + 1e4).contiguous(memory_format=format).requires_grad_()
    truth = x.detach().double().requires_grad_()
    mean, var = torch.zeros(5), torch.ones(5)
    y, expected = batch_norm(x, mean, var, training=True, momentum=1.0), F.batch_norm(truth, None, None, training=True)
    assert (y - expected).abs().max() < 5e-6
    exact = truth.detach().var((0, 2, 3))
    assert ((var - exact) / exact).abs().max() < 1e-6
    assert (mean - truth.detach().mean((0, 2, 3))).abs().max() < 1e-3
    dy = torch.randn(8, 5, 40, 40)
    (dx,), (right,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, truth, dy.double())
    assert (dx - right).abs().max() < 1e-5


# Relative, root mean squares; rounding to float32 alone gives 2.5e-8. Sums whose terms cancel show what else is lost.
@pytest.mark.skipif(DEVICE != "cpu", reason="kernels for the CPU")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize(("channels", "size"), [(64, 112), (256, 14)])
def test_sums_lose_few_digits(
    isa: str, dtype: torch.dtype, layout: str, offset: float, channels: int, size: int
) -> None:
    rows = {k["pass"]: k for k in C.kernels() if (k["op"], k["isa"], k["dtype"]) == ("batch_norm", isa, str(dtype)[6:])}
    if not rows["training"]["usable"]:
        pytest.skip(f"{isa} cannot be used on this machine")
    format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    x, dy = ((torch.randn(1, channels, size, size) + o).to(dtype).contiguous(memory_format=format) for o in (offset, 0))
    mean, var = (torch.empty(channels, dtype=torch.float64) for _ in range(2))
    weight, dweight, dbias = torch.ones(channels), torch.empty(channels), torch.empty(channels)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    C.batch_norm_forward(y, mean, var, x, weight, None, None, True, 1e-5, 0, 2, rows["training"]["row"])
    C.batch_norm_backward(
        dx, dweight, dbias, None, dy, x, None, None, mean, var, weight, None, True, 1e-5, 0, 2, rows["backward"]["row"]
    )
    exact = x.double().mean((0, 2, 3))
    deviation = x.double() - exact[:, None, None]
    exact = exact + deviation.mean((0, 2, 3))
    squares = deviation.square().mean((0, 2, 3))
    invstd = (squares + 1e-5).rsqrt()

    def error(got: Tensor, right: Tensor) -> float:
        return float((got - right).square().mean().sqrt() / right.square().mean().sqrt())

    # Rows of float32 are summed in float32, planes in float64; sums of 16-bit numbers need no more than float32.
    assert error(mean, exact) < (2.2e-7 if layout == "nhwc" and dtype == torch.float32 else 5e-8)
    assert error(var, squares) < 1.2e-7
    assert error(dbias, dy.double().sum((0, 2, 3))) < 1.7e-7
    assert error(dweight, (dy.double() * deviation).sum((0, 2, 3)) * invstd) < 1.9e-7


def test_constant_channel_has_no_variance() -> None:
    x = torch.full((4, 3, 7, 7), 0.1)
    torch.testing.assert_close(batch_norm(x, None, None, training=True), torch.zeros_like(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_nan_and_inf_stay_in_their_channel(value: float, format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=format)
    x[1, 1, 2, 2] = value
    y = batch_norm(x, None, None, training=True, activation="relu")
    assert torch.equal(y.isnan(), F.batch_norm(x, None, None, training=True).relu().isnan())
    assert y[:, 1].isnan().all()
    stats = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(batch_norm(x, *stats), F.batch_norm(x, *stats), equal_nan=True)


@pytest.mark.parametrize("shape", [(16, 3, 100, 100), (8, 70, 30, 30), (9000, 17)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], last: bool) -> None:
    x = torch.randn(shape)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
            leaves = [
                x.clone(memory_format=torch.preserve_format).requires_grad_(),
                torch.ones(shape[1], requires_grad=True),
            ]
            y = batch_norm(leaves[0], mean, var, leaves[1], training=True, activation="tanh")
            results.append([y, mean, var, *torch.autograd.grad(y, leaves, x)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (2, 3, 0, 4)], ids=str)
def test_empty_batch(shape: tuple[int, ...], training: bool) -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, 3, 3))
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=x)
    assert y.shape == shape
    for grad in torch.autograd.grad(y.sum(), (x, weight, bias), allow_unused=True):
        assert grad is None or not grad.count_nonzero()
    assert torch.equal(mean, torch.zeros(3))


def test_needs_only_what_is_asked() -> None:
    weight, bias, x = leaf(3), leaf(3), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = batch_norm(x, None, None, weight, bias, True, activation="relu")
    e = composed(x, None, None, weight, bias, True, activation="relu")
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias), torch.autograd.grad(e.sum(), bias))


def test_running_statistics_count_as_changed() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    before = mean._version
    batch_norm(torch.randn(2, 3, 4, 4), mean, var, training=True)
    assert mean._version > before
    assert var._version > before


def test_strided_running_statistics() -> None:
    x, strided, dense = torch.randn(2, 3, 4, 4), torch.zeros(6, 2), [torch.zeros(3), torch.zeros(3)]
    batch_norm(x, strided[::2, 0], strided[::2, 1], training=True)
    F.batch_norm(x, *dense, training=True)
    torch.testing.assert_close(strided[::2].T, torch.stack(dense))
    assert not strided[1::2].any()


X = torch.ones(2, 3, 4, 4)
BAD: dict[str, Callable[[Callable, Tensor, Tensor], Tensor]] = {
    "evaluation without statistics": lambda f, m, v: f(X, None, None),
    "evaluation without variance": lambda f, m, v: f(X, m, None),
    "training with one statistic": lambda f, m, v: f(X, m, None, training=True),
    "mean too long": lambda f, m, v: f(X, torch.zeros(4), v, training=True),
    "variance too long": lambda f, m, v: f(X, m, torch.ones(4), training=True),
    "weight too long": lambda f, m, v: f(X, m, v, torch.ones(4), training=True),
    "bias too long": lambda f, m, v: f(X, m, v, torch.ones(3), torch.ones(4), training=True),
    "rank 1": lambda f, m, v: f(torch.ones(3), m, v),
    "rank 0": lambda f, m, v: f(torch.ones(()), m, v),
    "integers": lambda f, m, v: f(torch.ones(2, 3, 4, 4, dtype=torch.int64), m, v, training=True),
    "float64 input": lambda f, m, v: f(X.double(), m, v, training=True),
    "float64 weight": lambda f, m, v: f(X, m, v, torch.ones(3).double(), training=True),
    "bfloat16 weight beside float32 statistics": lambda f, m, v: f(
        X.bfloat16(), m, v, torch.ones(3).bfloat16(), training=True
    ),
    "one value per channel": lambda f, m, v: f(torch.ones(1, 3, 1, 1), m, v, training=True),
    "momentum None": lambda f, m, v: f(X, m, v, training=True, momentum=None),
    "negative eps": lambda f, m, v: f(X, m, v, training=True, eps=-1.0),
    "eps 0 in training": lambda f, m, v: f(X, m, v, training=True, eps=0.0),
    "statistics that require a gradient": lambda f, m, v: f(
        X.clone().requires_grad_(), m.clone().requires_grad_(), v, training=True
    ),
    "another device": lambda f, m, v: f(X, m, v, torch.ones(3, device="meta"), training=True),
    "no tensor": lambda f, m, v: f([1.0], m, v),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_calls_raise_as_pytorch(bad: str) -> None:
    with pytest.raises(Exception) as expected:
        BAD[bad](F.batch_norm, torch.zeros(3), torch.ones(3))
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(Exception) as got:
        BAD[bad](batch_norm, mean, var)
    assert type(got.value) is type(expected.value)
    assert str(got.value)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


@pytest.mark.parametrize(
    "residual",
    [
        torch.ones(2, 3, 4, 5),
        torch.ones(3, 4, 4),
        torch.ones(2, 3, 4, 4).double(),
        torch.ones(2, 3, 4, 4, device="meta"),
    ],
)
def test_residual_unlike_the_input(residual: Tensor) -> None:
    with pytest.raises(RuntimeError, match="residual"):
        batch_norm(X, mean := torch.zeros(3), torch.ones(3), training=True, residual=residual)
    assert torch.equal(mean, torch.zeros(3))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="relu6"):
        batch_norm(X, mean := torch.zeros(3), torch.ones(3), training=True, activation="swish")
    assert torch.equal(mean, torch.zeros(3))


CASES = [
    # activation, residual, weight, bias
    (None, False, True, True),
    (None, True, False, True),
    ("tanh", False, True, False),
    ("sigmoid", True, True, True),
    ("softplus", True, True, True),
    ("elu", True, False, False),
    ("silu", True, True, True),
    ("gelu", False, True, True),
]


def call(training: bool, activation: str | None, given: str) -> Callable[..., Tensor]:
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5

    def function(*tensors: Tensor) -> Tensor:
        t = dict(zip(given, tensors, strict=True))
        stats = (None, None) if training else (mean, var)
        return batch_norm(
            t["x"], *stats, t.get("w"), t.get("b"), training, eps=1e-2, activation=activation, residual=t.get("r")
        )

    return function


@pytest.mark.parametrize(("activation", "residual", "weight", "bias"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_any_order(
    training: bool, activation: str | None, residual: bool, weight: bool, bias: bool
) -> None:
    given = "x" + "w" * weight + "b" * bias + "r" * residual
    tensors = [leaf(2, 3, 2, 2) if k in "xr" else leaf(3) for k in given]
    function = call(training, activation, given)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("training", [True, False])
def test_piecewise_linear_activations_away_from_their_kinks(training: bool) -> None:
    x, r, dy = leaf(3, 3, 1, 2), leaf(3, 3, 1, 2), torch.randn(3, 3, 1, 2, dtype=torch.float64)
    for activation in ("relu", "relu6", "leaky_relu", "hardswish"):
        function = call(training, activation, "xr")
        assert torch.autograd.gradcheck(function, (x, r))
        assert torch.autograd.gradgradcheck(function, (x, r), dy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", True), ("gelu", True)])
def test_opcheck(training: bool, activation: str | None, residual: bool) -> None:
    ops = torch.ops.cnnops
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    w, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    r = torch.randn(2, 3, 4, 5, requires_grad=True) if residual else None
    mean, var, act = torch.randn(3), torch.rand(3) + 0.5, _activation.INDEX[activation]
    if training:
        torch.library.opcheck(ops.batch_norm_training.default, (x, w, b, r, 1e-5, act))
    else:
        torch.library.opcheck(ops.batch_norm_evaluation.default, (x, mean, var, w, b, r, 1e-5, act))
    y = torch.randn(2, 3, 4, 5) if activation == "relu" and residual else None
    stats = (mean.double(), var.double()) if training else (mean, var)
    for wants in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        torch.library.opcheck(
            ops.batch_norm_backward.default,
            (torch.randn(2, 3, 4, 5), x, y, r, *stats, w, b, training, 1e-5, act, wants),
        )


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(3)
        torch.nn.init.normal_(self.bn.weight)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        b = self.bn
        return batch_norm(
            x, b.running_mean, b.running_var, b.weight, b.bias, b.training, 0.1, activation="relu", residual=residual
        )


@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    plain, compiled = Block().train(training), Block().train(training)
    compiled.load_state_dict(plain.state_dict())
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, r = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(2))
    results = []
    for f, module in ((plain, plain), (function, compiled)):
        y = f(x, r)
        grads = torch.autograd.grad(y.square().sum(), (x, r, module.bn.weight, module.bn.bias))
        results.append([y, *grads, module.bn.running_mean, module.bn.running_var])
    torch.testing.assert_close(*results)


def test_export() -> None:
    block, x = Block().eval(), torch.randn(2, 3, 5, 4)
    program = torch.export.export(block, (x, x))
    assert any("cnnops" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, x), block(x, x))


@pytest.mark.parametrize("training", [True, False])
def test_func_transforms(training: bool) -> None:
    x, w, b = (t.detach() for t in (leaf(2, 3, 4, 4), leaf(3), leaf(3)))
    stats = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double())

    def loss(function: Callable, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(function(x, *stats, w, b, training)).sum()

    args = [torch.func.grad(loss, argnums=(1, 2, 3))(f, x, w, b) for f in (batch_norm, F.batch_norm)]
    torch.testing.assert_close(*args)
    second = [
        torch.func.grad(lambda x, f=f: torch.func.grad(loss, 1)(f, x, w, b).square().sum())(x)
        for f in (batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*second)
    xs, ws = torch.randn(4, 2, 3, 4, 4).double(), torch.randn(4, 3).double()
    many = [torch.vmap(lambda x, f=f: f(x, *stats, w, b, training))(xs) for f in (batch_norm, F.batch_norm)]
    torch.testing.assert_close(*many)
    many = [
        torch.vmap(lambda x, w, f=f: f(x, *stats, w, b, training), (1, 0))(xs.transpose(0, 1), ws)
        for f in (batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*many)
    per_sample = [
        torch.vmap(torch.func.grad(loss, 1), (None, 0, None, None))(f, xs, w, b) for f in (batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*per_sample)


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(training: bool) -> None:
    x, r, t = (torch.randn(2, 3, 4, 4).double() for _ in range(3))
    stats = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        got = batch_norm(dual, *stats, training=training, activation="tanh", residual=r)
        expected = composed(dual, *stats, None, None, training, activation="tanh", residual=r)
        torch.testing.assert_close(forward_ad.unpack_dual(got), forward_ad.unpack_dual(expected))
    one = [
        torch.func.jvp(lambda x, f=f: f(x, *stats, training=training), (x,), (t,)) for f in (batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*one)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode(inside: bool) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    expected = [torch.zeros(3), torch.ones(3)]
    x = torch.randn(2, 3, 4, 4)
    with torch.inference_mode():
        if inside:
            mean, var = torch.zeros(3), torch.ones(3)
        y = batch_norm(x, mean, var, training=True)
    torch.testing.assert_close(y, F.batch_norm(x, *expected, training=True))
    torch.testing.assert_close([mean, var], expected)


def test_checkpoint_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    x, w = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, w, training=True, activation="relu")

    kept = torch.autograd.grad(function(x).square().sum(), (x, w))
    torch.testing.assert_close(
        torch.autograd.grad(checkpoint(function, x, use_reentrant=False).square().sum(), (x, w)), kept
    )
    # A sum's gradient is no dense tensor: one that the extension's own call refuses.
    kept = torch.autograd.grad(function(x).sum(), (x, w))
    torch.testing.assert_close(torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sum(), (x, w)), kept)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert batch_norm(x, None, None, w, training=True).dtype == F.batch_norm(x, None, None, w, training=True).dtype
        low = x.bfloat16()
        assert batch_norm(low, None, None, w, training=True).dtype == torch.bfloat16


def test_meta_tensors() -> None:
    x, v = (
        torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last),
        torch.empty(3, device="meta"),
    )
    y = batch_norm(x, v, v, v, v, training=True)
    assert y.device.type == "meta"
    assert y.stride() == x.stride()
