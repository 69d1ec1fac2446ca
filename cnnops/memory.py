"""The memory of results and of kernels' scratch.

Large results come from one region of address space whose pages stay mapped after a tensor dies, so that a loop of equal
steps takes next to no page faults. What is kept is bounded, visible here, and can be given back.

>>> cnnops.memory.stats()["cached"]       # bytes that are mapped and unused
>>> cnnops.memory.empty_cache()           # back to the system
>>> cnnops.memory.set_limit(1 << 30)      # keep at most 1 GiB; 0: keep nothing
"""

from __future__ import annotations

from ._lib import C


def stats() -> dict[str, int]:
    """Bytes ``in_use`` and ``peak_in_use`` in blocks of 64 KiB or more, mapped but unused (``cached``), the ``limit``
    on that, and how many blocks came from mapped memory (``hits``) and from the system (``misses``)."""
    return C.memory_stats()


def empty_cache() -> None:
    """Gives all memory that no tensor uses back to the system."""
    C.memory_empty_cache()


def set_limit(size: int) -> None:
    """Keeps at most ``size`` bytes mapped beyond what tensors use; 0 turns keeping off.

    Raises:
        ValueError: ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"set_limit(): size must not be negative, but got {size}")
    C.memory_set_limit(size)
