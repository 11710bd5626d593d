#!/usr/bin/env bash
# Install the named tools of releases from Debian if they are missing: skopeo, cosign, docker-registry.
set -euo pipefail

fail() { # what, why, do
  printf 'release-tools: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}

missing=()
for tool in "$@"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || fail "${missing[*]} is not installed" "they can be installed on Debian only" \
  "install them: https://github.com/containers/skopeo, https://github.com/sigstore/cosign"
[ "$(id -u)" = 0 ] || fail "${missing[*]} is not installed" "installing needs root; the user is $(id -un)" \
  "sudo docker/release_tools.sh $*"
echo "release-tools: installing ${missing[*]} from Debian"
# Bookworm has no cosign; trixie's runs on it.
"$(dirname "$0")/trixie.sh"
for tool in "${missing[@]}"; do
  DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends "$tool" ||
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends "$tool/trixie" ||
    fail "$tool can't be installed" "apt-get's message is above" "make release-tools again, or install $tool by hand"
done
