"""The functions: names, signatures and meanings as in :mod:`torch.nn.functional`, and what it does not have."""

from .ops.avg_pool2d import avg_pool2d
from .ops.batch_norm import batch_norm
from .ops.conv2d import conv2d, conv_transpose2d
from .ops.locally_connected2d import locally_connected2d
from .ops.max_pool2d import max_pool2d

__all__ = [
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "conv_transpose2d",
    "locally_connected2d",
    "max_pool2d",
]
