"""The functions: the same names, signatures and meanings as in :mod:`torch.nn.functional`, and what it does not have."""

from .ops.avg_pool2d import avg_pool2d

__all__ = ["avg_pool2d"]
