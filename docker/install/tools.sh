#!/bin/bash
# Install strip(1), and a virtual environment with uv and the build backends of docker/tools.txt, in /opt/tools.
set -euo pipefail
rm -f /etc/apt/apt.conf.d/docker-clean
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends binutils
python3 -m venv /opt/tools
PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
  /opt/tools/bin/pip install -q --disable-pip-version-check --require-hashes -r /tools.txt
