#!/bin/sh
# Install what is locked into /opt/venv, and nothing that is not: --no-deps.
set -eu
export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_SYSTEM_CERTS=1
export UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy # the cache is another file system
export UV_PYTHON=/opt/venv/bin/python UV_NO_CONFIG=1
exec /opt/tools/bin/uv pip install --no-deps --no-progress "$@"
