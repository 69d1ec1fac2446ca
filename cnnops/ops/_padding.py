"""Padding as the convolutions take it: an int, a pair, or one of three words."""

from __future__ import annotations

from collections.abc import Sequence

from ._core import pair

WORDS = ("valid", "same", "full")


def resolve(
    op: str,
    padding: int | Sequence[int] | str,
    input_hw: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """The rows and columns of zeros to add: (top, bottom, left, right).

    ``"valid"``
        none.
    ``"same"``
        as many as make the output ``ceil(input / stride)``; an odd one goes to the bottom or right. With stride 1 this
        is PyTorch's "same".
    ``"full"``
        ``dilation * (kernel - 1)`` on each side: every input pixel meets every filter tap.

    Raises:
        RuntimeError: an unknown word, or a negative number.
        TypeError: anything but an int, a pair of ints or a word.
    """
    if isinstance(padding, str):
        if padding not in WORDS:
            raise RuntimeError(f"{op}(): padding must be an int, a pair of ints or one of {WORDS}, but got {padding!r}")
        if padding == "valid":
            return 0, 0, 0, 0
        sides: list[int] = []
        for size, k, s, d in zip(input_hw, kernel, stride, dilation, strict=True):
            reach = d * (k - 1)
            if padding == "full":
                sides += (reach, reach)
            else:
                total = max((-(-size // s) - 1) * s + reach + 1 - size, 0)
                sides += (total // 2, total - total // 2)
        return sides[0], sides[1], sides[2], sides[3]
    vertical, horizontal = pair(padding, "padding", op)
    if vertical < 0 or horizontal < 0:
        raise RuntimeError(f"{op}(): padding must not be negative, but got {(vertical, horizontal)}")
    return vertical, vertical, horizontal, horizontal


__all__ = ["WORDS", "resolve"]
