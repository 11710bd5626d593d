#!/bin/bash
# Make of CUDA's wheels what compilers expect of a CUDA installation, at /usr/local/cuda.
set -euo pipefail
home=$(echo /opt/venv/lib/python3.*/site-packages/nvidia/cu13)
ln -s "$home" /usr/local/cuda
ln -s lib "$home/lib64"
cd "$home/lib"
# The wheels have libfoo.so.N alone; linking with -lfoo wants libfoo.so.
for file in lib*.so.*; do
  name=${file%%.so.*}.so
  [ -e "$name" ] || ln -s "$file" "$name"
done
# libcuda comes with a driver, which a build machine lacks; SageAttention links -lcuda. The stub has
# the function that it calls: the linker leaves out a library that defines nothing which is asked of
# it, and then nobody loads the driver's (`undefined symbol: cuTensorMapEncodeTiled`).
mkdir -p stubs
gcc -shared -fPIC -x c - -o stubs/libcuda.so -Wl,-soname,libcuda.so.1 \
  <<<"void cuTensorMapEncodeTiled(void) {}"
