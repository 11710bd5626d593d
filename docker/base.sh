#!/usr/bin/env bash
# Make the base image, attnimg-base:bookworm (`make base`): the public slim image, or, if no registry
# is reachable, the same content from the machine's own apt sources.
set -euo pipefail
public=${BASE_IMAGE:-python:3.11-slim-bookworm}
tag=attnimg-base:bookworm

if docker image inspect "$tag" >/dev/null 2>&1; then
  echo "base: $tag exists; remove it with docker image rm to make it again"
  exit 0
fi
if docker image inspect "$public" >/dev/null 2>&1 || timeout 120 docker pull -q "$public"; then
  docker tag "$public" "$tag"
  echo "base: $tag is $public"
  exit 0
fi
if ! command -v mmdebstrap >/dev/null; then
  printf 'base: %s\n  why: %s\n  do:  %s\n' "there is no base image" \
    "no registry has $public, and mmdebstrap is not installed" \
    "apt-get install mmdebstrap, or docker load an image and tag it $tag" >&2
  exit 1
fi
echo "base: no registry has $public; making Debian bookworm with Python 3.11 by mmdebstrap"
# These paths are excluded in Debian's own slim images too.
excluded=('man/*' 'info/*' 'locale/*' 'lintian/*' 'doc/*')
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
  --aptopt='APT::Install-Recommends "false"' "${excluded[@]/#/--dpkgopt=path-exclude=/usr/share/}" \
  --dpkgopt='path-include=/usr/share/doc/*/copyright' bookworm - | docker import --change 'CMD ["python3"]' - "$tag" >/dev/null
echo "base: made $tag"
