"""Describe this machine: GPU, driver, packages, and the kernels that came with the image."""
