#!/usr/bin/env bash
# Have the base that images are built on, as attnimg-base:bookworm (`make base`): the public slim
# image, or, where no registry answers, the same thing made from the machine's own apt sources.
set -euo pipefail
public=${BASE_IMAGE:-python:3.11-slim-bookworm}
tag=attnimg-base:bookworm

if docker image inspect "$tag" >/dev/null 2>&1; then
  echo "base: $tag is here already; docker image rm it to make it again"
  exit 0
fi
if docker image inspect "$public" >/dev/null 2>&1 || timeout 120 docker pull -q "$public"; then
  docker tag "$public" "$tag"
  echo "base: $tag is $public"
  exit 0
fi
if ! command -v mmdebstrap >/dev/null; then
  printf 'base: %s\n  why: %s\n  do:  %s\n' "there is no base image" \
    "no registry gives $public, and mmdebstrap is not installed" \
    "apt-get install mmdebstrap, or docker load an image and tag it $tag" >&2
  exit 1
fi
echo "base: no registry gives $public; making Debian bookworm with python 3.11 by mmdebstrap"
# Paths left out are those that Debian's own slim images leave out.
left_out=('man/*' 'info/*' 'locale/*' 'lintian/*' 'doc/*')
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
  --aptopt='APT::Install-Recommends "false"' "${left_out[@]/#/--dpkgopt=path-exclude=/usr/share/}" \
  --dpkgopt='path-include=/usr/share/doc/*/copyright' bookworm - | docker import --change 'CMD ["python3"]' - "$tag" >/dev/null
echo "base: made $tag"
