"""Compile kernels without a GPU when an image is built, instead of at their first use.

build.py runs worker.py for each architecture and checks the results. fa4/ and triton/ are for one
compiler each: its method.py has the functions that build.py and worker.py call.
"""
