"""The operators, one file each; importing this package registers ``torch.ops.cnnops.*``."""

from . import avg_pool2d as avg_pool2d
from . import conv2d as conv2d
from . import max_pool2d as max_pool2d
