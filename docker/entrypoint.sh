#!/bin/bash
# Run an attnimg command or any other program; without arguments, show the help. The program replaces
# this shell under tini, so that it gets the signals and its exit code is the container's.
set -euo pipefail

fail() { # code, what, why, do
  printf 'attnimg: %s\n  why: %s\n  do:  %s\n' "${@:2}" >&2
  exit "$1"
}

# All caches are under /cache. If that is not writable, as in a --read-only container with a volume
# elsewhere, they are created in the working directory or a temporary one, with a message.
cache=/cache
if ! [ -w "$cache" ]; then
  for cache in "$PWD/.cache" /tmp/attnimg-cache /dev/shm/attnimg-cache; do
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] && break
  done
  echo "attnimg: /cache is not writable for user $(id -u); caches go to $cache" >&2
  while read -r name; do
    [[ ${!name}/ != /cache/* ]] || export "$name=$cache${!name#/cache}"
  done < <(compgen -e)
fi
mkdir -p "$HOME"
if ! [ -w /tmp ]; then
  export TMPDIR=$cache/tmp
  mkdir -p "$TMPDIR"
fi

[ $# -gt 0 ] || set -- --help
if [[ $1 == -* ]] || grep -qxF -- "$1" /opt/attnimg/commands; then
  exec attnimg "$@"
fi
command -v -- "$1" >/dev/null || fail 127 "$1 is neither an attnimg command nor a program here" \
  "attnimg's commands are: $(paste -sd ' ' /opt/attnimg/commands)" "docker run IMAGE --help"
# For other programs; attnimg's commands set up the kernel caches themselves.
if { compgen -G "/opt/attnimg/*/manifest.json" && command -v nvidia-smi; } >/dev/null ||
  [ -e /dev/kfd ]; then
  eval "$(python -P -m attnimg.machine.kernel_cache)"
fi
exec "$@"
