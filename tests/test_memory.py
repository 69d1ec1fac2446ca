"""The pool of host memory."""

from __future__ import annotations

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
