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

def adaptive_avg_pool2d_backward(dx: Tensor, dy: Tensor, threads: int, kernel: int = -1) -> None: ...
def adaptive_avg_pool2d_backward_direct(dy: Tensor, h: int, w: int, channels_last: bool, threads: int) -> Any: ...
def adaptive_avg_pool2d_direct(x: Tensor, output_size: Any, grad: bool, threads: int) -> Any: ...
def adaptive_avg_pool2d_forward(y: Tensor, x: Tensor, threads: int, kernel: int = -1) -> None: ...
def adaptive_max_pool2d_direct(x: Tensor, output_size: Any, return_indices: bool, grad: bool, threads: int) -> Any: ...
def adaptive_max_pool2d_forward(y: Tensor, indices: Tensor, x: Tensor, threads: int, kernel: int = -1) -> None: ...
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
def avg_pool2d_backward_direct(
    dy: Tensor,
    h: int,
    w: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
    channels_last: bool,
    threads: int,
) -> Any: ...
def avg_pool2d_direct(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    grad: bool,
    threads: int,
) -> Any: ...
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
def batch_norm_backward(
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def batch_norm_backward_direct(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    wants: list[bool],
    threads: int,
) -> Any: ...
def batch_norm_direct(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    grad: bool,
    threads: int,
) -> Any: ...
def batch_norm_forward(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    threads: int,
    kernel: int = -1,
) -> None: ...
def batch_norm_gradients_direct(context: object, dy: Tensor, saved: tuple, threads: int) -> Any: ...
def batch_norm_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int, kernel: int = -1
) -> None: ...
def conv2d_backward_direct(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    threads: int,
    precision: int,
) -> Any: ...
def conv2d_bias_grad(db: Tensor, dy: Tensor, threads: int, kernel: int = -1) -> None: ...
def conv2d_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: int,
    grad: bool,
    threads: int,
    precision: int,
) -> Any: ...
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
    precision: int = 0,
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
    precision: int = 0,
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
    precision: int = 0,
    kernel: int = -1,
) -> None: ...
def conv_transpose2d_backward_direct(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    threads: int,
    precision: int,
) -> Any: ...
def conv_transpose2d_direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    grad: bool,
    threads: int,
    precision: int,
) -> Any: ...
def cuda_build() -> Any: ...
def empty(like: object, shape: Sequence[int], code: int, bits: int, channels_last: bool) -> Any: ...
def gradient_direct(function: object, dy: Tensor, saved: tuple, arguments: tuple, threads: int) -> Any: ...
def index_pool2d_backward(
    dx: Tensor,
    dy: Tensor,
    choice: Tensor,
    kernel_size: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def index_pool2d_backward_direct(
    dy: Tensor, choice: Tensor, h: int, w: int, kernel: Any, stride: Any, padding: Any, dilation: Any, threads: int
) -> Any: ...
def index_pool2d_gather(
    dy: Tensor,
    dx: Tensor,
    choice: Tensor,
    kernel_size: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def isa_levels() -> list[dict[str, Any]]: ...
def isa_limit() -> str: ...
def kernels() -> list[dict[str, Any]]: ...
def locally_connected2d_forward(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def locally_connected2d_input_grad(
    dx: Tensor,
    dy: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def locally_connected2d_weight_grad(
    dw: Tensor,
    dy: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def max_pool2d_direct(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
    grad: bool,
    threads: int,
) -> Any: ...
def max_pool2d_forward(
    y: Tensor,
    choice: Tensor | None,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def median_pool2d_forward(
    y: Tensor,
    choice: Tensor | None,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    threads: int,
    kernel: int = -1,
) -> None: ...
def memory_empty_cache() -> None: ...
def memory_set_limit(bytes: int) -> None: ...
def memory_stats() -> dict[str, Any]: ...
def omp_max_threads() -> int: ...
def peak_fma(y: Tensor, x: Tensor, a: float, b: float, iterations: int, threads: int, kernel: int = -1) -> None: ...
def set_isa_limit(level: str) -> None: ...
def set_plain_types(tensor: object, parameter: object) -> None: ...
def set_watched(questions: Sequence[object]) -> None: ...
def undisturbed() -> bool: ...
