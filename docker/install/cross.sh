#!/bin/bash
# Put what a cross compiler for aarch64 needs into /opt/target: torch's headers and libraries, CUDA's runtime and
# Python's settings for arm64. torch's headers replace the build machine's, which differ (ATen/Config.h).
set -euo pipefail
site=$(echo /opt/venv/lib/python3.*/site-packages)
# Of the lock file these two alone: CUDA's headers are the same for both, and other libraries are not linked.
awk '/^[a-z]/ { wanted = /^(torch|nvidia-cuda-runtime)==/ } wanted' /torch.txt >/tmp/wanted.txt
/install/install.sh --require-hashes --only-binary :all: -r /tmp/wanted.txt \
  --target /tmp/whole --python-platform aarch64-manylinux_2_36
mkdir -p /opt/target/{torch,nvidia/cu13,stubs,python}
mv /tmp/whole/torch/{include,lib} /opt/target/torch
mv /tmp/whole/nvidia/cu13/lib /opt/target/nvidia/cu13
rm -rf /tmp/whole /tmp/wanted.txt "$site/torch/include"
ln -s /opt/target/torch/include "$site/torch/include"
ln -s libcudart.so.13 /opt/target/nvidia/cu13/lib/libcudart.so
# As in cuda_home.sh.
aarch64-linux-gnu-gcc -shared -fPIC -x c - -o /opt/target/stubs/libcuda.so -Wl,-soname,libcuda.so.1 \
  <<<"void cuTensorMapEncodeTiled(void) {}"
# Python's settings tell setup.py the compiler, and the names of extensions and wheels. A folder with this one
# file: the rest of Debian's Python would hide the build machine's.
ln -s /usr/lib/python3.11/_sysconfigdata__aarch64-linux-gnu.py /opt/target/python
