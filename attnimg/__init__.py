"""The right attention kernels for your GPU: chosen, checked, applied to a training run."""

__version__ = "0.1.0"
