#!/bin/bash
# Run an attnimg command or any other program; without arguments, show the help. The program replaces
# this shell under tini, so that it gets the signals and its exit code is the container's. The folders
# of caches are chosen by attnimg itself, and for other programs by the first line of `eval`.
set -euo pipefail

fail() { # code, what, why, do
  printf 'attnimg: %s\n  why: %s\n  do:  %s\n' "${@:2}" >&2
  exit "$1"
}

[ $# -gt 0 ] || set -- --help
if [[ $1 == -* ]] || grep -qxF -- "$1" /opt/attnimg/commands; then
  exec attnimg "$@"
fi
command -v -- "$1" >/dev/null || fail 127 "$1 is neither an attnimg command nor a program here" \
  "attnimg's commands are: $(paste -sd ' ' /opt/attnimg/commands)" "docker run IMAGE --help"
eval "$(python -P -c "from attnimg.machine.container import main; main()")"
# attnimg's commands set up the kernel caches themselves, too.
if { compgen -G "/opt/attnimg/*/manifest.json" && command -v nvidia-smi; } >/dev/null ||
  [ -e /dev/kfd ]; then
  eval "$(python -P -m attnimg.machine.kernel_cache)"
fi
exec "$@"
