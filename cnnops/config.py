"""The only reader of environment variables.

==============  ====================================================================================================
``CNNOPS_ISA``  highest instruction-set level to use: ``baseline``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx``
==============  ====================================================================================================
"""

from __future__ import annotations

import os


def isa_limit() -> str:
    """The value of ``CNNOPS_ISA``; empty where it is not set. The extension checks it."""
    return os.environ.get("CNNOPS_ISA", "").strip().lower()
