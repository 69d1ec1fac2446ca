"""The benchmark behind ``cnnops bench``: every answer is checked, then timed in turn with PyTorch's.

``suites`` reads the layers, ``cases`` builds tensors and calls, ``check`` holds results against float64, ``timing``
measures, ``runner`` goes through the entries, ``report`` prints and ``compare`` finds regressions. Only ``suites``,
``report`` and ``compare`` work without torch.
"""
