"""Select the attention kernels for a GPU, verify them, and use them in a training run."""

__version__ = "0.1.0"
