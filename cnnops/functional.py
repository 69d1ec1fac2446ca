"""The functions: names, signatures and meanings as in :mod:`torch.nn.functional`, and what it does not have."""

from .ops.adaptive_avg_pool2d import adaptive_avg_pool2d
from .ops.adaptive_max_pool2d import adaptive_max_pool2d
from .ops.avg_pool2d import avg_pool2d
from .ops.batch_norm import batch_norm
from .ops.conv2d import conv2d, conv_transpose2d
from .ops.locally_connected2d import locally_connected2d
from .ops.max_pool2d import max_pool2d
from .ops.median_pool2d import median_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "conv_transpose2d",
    "locally_connected2d",
    "max_pool2d",
    "median_pool2d",
]
