"""The operators, one file each; importing this package registers ``torch.ops.cnnops.*``."""

from . import adaptive_avg_pool2d as adaptive_avg_pool2d
from . import adaptive_max_pool2d as adaptive_max_pool2d
from . import avg_pool2d as avg_pool2d
from . import batch_norm as batch_norm
from . import conv2d as conv2d
from . import locally_connected2d as locally_connected2d
from . import max_pool2d as max_pool2d
from . import median_pool2d as median_pool2d
