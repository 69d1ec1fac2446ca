"""The extension's functions, written by `make stub`. Kernels fill the tensors they are given first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor | np.ndarray[Any, Any]

class KernelTypeError(TypeError): ...

__version__: str
activations: list[str]
compiler: str

def avg_pool2d_backward(
    dx: Tensor,
    dy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def avg_pool2d_forward(
    y: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def conv2d_bias_grad(db: Tensor, dy: Tensor, threads: int, kernel: int = -1) -> None: ...
def conv2d_forward(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def conv2d_input_grad(
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def conv2d_weight_grad(
    dw: Tensor,
    dy: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def isa_levels() -> list[dict[str, Any]]: ...
def isa_limit() -> str: ...
def kernels() -> list[dict[str, Any]]: ...
def omp_max_threads() -> int: ...
def set_isa_limit(level: str) -> None: ...
