"""The operators, one file each; importing this package registers ``torch.ops.cnnops.*``."""

from .avg_pool2d import avg_pool2d as avg_pool2d
