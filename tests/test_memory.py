"""The pool of host memory."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import cnnops
from cnnops import functional as CF


@pytest.fixture(autouse=True)
def restore() -> object:
    limit = cnnops.memory.stats()["limit"]
    yield
    cnnops.memory.set_limit(limit)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return CF.avg_pool2d(x, 1)


def test_a_loop_takes_its_results_from_mapped_memory() -> None:
    x = torch.randn(4, 16, 64, 64)
    for _ in range(3):
        pooled(x)
    before = cnnops.memory.stats()
    for _ in range(20):
        pooled(x)
    after = cnnops.memory.stats()
    assert after["hits"] >= before["hits"] + 20
    assert after["misses"] == before["misses"]
    assert after["in_use"] == before["in_use"]


def test_in_use_follows_tensors_and_empty_cache_gives_back() -> None:
    cnnops.memory.empty_cache()
    assert cnnops.memory.stats()["cached"] == 0
    before = cnnops.memory.stats()["in_use"]
    y = pooled(torch.randn(2, 8, 128, 128))
    assert cnnops.memory.stats()["in_use"] - before == y.numel() * 4
    view = y[1]
    del y
    assert cnnops.memory.stats()["in_use"] - before == view._base.numel() * 4 if view._base is not None else True
    del view
    assert cnnops.memory.stats()["in_use"] == before
    assert cnnops.memory.stats()["cached"] > 0
    cnnops.memory.empty_cache()
    assert cnnops.memory.stats()["cached"] == 0


def test_the_limit_holds() -> None:
    cnnops.memory.set_limit(1 << 20)
    x = torch.randn(2, 8, 256, 256)
    kept = [pooled(x) for _ in range(3)]
    assert all(torch.equal(k, x) for k in kept)
    kept.clear()
    assert cnnops.memory.stats()["cached"] <= 1 << 20
    cnnops.memory.set_limit(0)
    assert cnnops.memory.stats()["cached"] == 0
    with pytest.raises(ValueError, match="size"):
        cnnops.memory.set_limit(-1)


def test_threads_share_the_pool_without_sharing_blocks() -> None:
    failures: list[int] = []

    def work(i: int) -> None:
        x = torch.full((2, 8, 96, 96), float(i))
        held = []
        for step in range(50):
            held.append(pooled(x))
            if step % 3 == 2:
                held.pop(0)
        if not all(bool((y == i).all()) for y in held):
            failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.skipif(sys.platform != "linux", reason="the pool is Linux's")
def test_training_steps_take_next_to_no_page_faults() -> None:
    import resource

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(32, 64, 1), torch.nn.SiLU(),
        torch.nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU6(inplace=True),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10),
    )  # fmt: skip
    cnnops.convert_(model)
    x = torch.randn(8, 3, 128, 128)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model.zero_grad()
        model(x).square().sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for _ in range(4):
        faults()
    # Its activations and their gradients are 200 MB: some 50,000 pages, were each new.
    assert min(faults() for _ in range(5)) < 100
