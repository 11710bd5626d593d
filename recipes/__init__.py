"""What each image is made of: TOML files, and the code that turns them into files.

images/ and kernels/ hold one file each; torch.toml and cuda.toml what their releases are.
Read, solve, render: `python -m recipes render`. Never inside an image.
"""
