"""Build a C++ extension for the torch of the image."""

from __future__ import annotations

from setuptools import setup  # type: ignore[import-untyped]  # setuptools has no types
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="scaled-sum",
    version="1.0",
    ext_modules=[CppExtension("scaled_sum", ["scaled_sum.cpp"], extra_compile_args=["-g0"])],
    cmdclass={"build_ext": BuildExtension},
)
