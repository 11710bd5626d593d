"""Compile kernels without a GPU when an image is built, which would be compiled at first use.

build.py runs worker.py for each architecture and checks what came out. fa4/ and triton/ know one
compiler each: its method.py has the functions that build.py and worker.py call.
"""
