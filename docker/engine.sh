#!/usr/bin/env bash
# Start a Docker engine if none is running (`make engine`); change nothing if one is.
# Installs Debian trixie's Docker 26: bookworm's 20.10 has no heredocs and no cache mounts (2026-11-21).
set -euo pipefail
log=${DOCKERD_LOG:-/var/log/dockerd.log}

fail() { # what, why, do
  printf 'engine: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}

if docker info >/dev/null 2>&1; then
  echo "engine: Docker $(docker info --format '{{.ServerVersion}}') is running; nothing to do"
  exit 0
fi
[ "$(id -u)" = 0 ] || fail "no Docker engine is running" "starting one needs root; the user is $(id -un)" \
  "sudo make engine, or start Docker Desktop or the docker service"
if ! command -v dockerd >/dev/null; then
  echo "engine: installing Docker from Debian trixie, with a low pin so that nothing else is upgraded"
  "$(dirname "$0")/trixie.sh"
  [ -e /etc/apt/sources.list.d/trixie.sources ] || fail "no Docker engine is installed" \
    "it can be installed on Debian bookworm only" "install Docker 23 or newer: https://docs.docker.com/engine/install"
  # Not `-t trixie`: that would upgrade libc6 too.
  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends docker.io/trixie \
    docker-buildx/trixie docker-cli/trixie containerd runc iptables mmdebstrap zstd
fi
echo "engine: starting dockerd; log: $log"
setsid dockerd </dev/null >"$log" 2>&1 &
for _ in $(seq 120); do
  docker info >/dev/null 2>&1 && echo "engine: ready" && exit 0
  kill -0 $! 2>/dev/null || break
  sleep 0.5
done
fail "dockerd did not start" "$(tail -n 1 "$log")" "read $log"
