"""Detect this machine: GPU, driver, packages, and the kernels in the image."""
