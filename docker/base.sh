#!/usr/bin/env bash
# Make the stand-in for the base image of recipes/bases.toml, attnimg-base:bookworm, from the machine's own apt sources:
# for machines that reach no registry. docker/base_image.py calls it; no image on it is published.
# Another tag, other packages and another processor can be given: docker/base.sh TAG PACKAGE,PACKAGE arm64
set -euo pipefail
tag=${1:-attnimg-base:bookworm}
packages=${2:-ca-certificates,python3,python3-venv}
arch=${3:-}

if docker image inspect "$tag" >/dev/null 2>&1; then
  echo "base: $tag exists; remove it with docker image rm to make it again"
  exit 0
fi
if ! command -v mmdebstrap >/dev/null; then
  printf 'base: %s\n  why: %s\n  do:  %s\n' "there is no base image" \
    "none could be pulled, and mmdebstrap, which makes one of Debian's packages, is not installed" \
    "apt-get install mmdebstrap, or BASE_IMAGE=NAME@sha256:... of a registry that this machine reaches" >&2
  exit 1
fi
echo "base: making Debian bookworm with $packages by mmdebstrap${arch:+, for $arch: 4 minutes}"
# These paths are excluded in Debian's own slim images too.
excluded=('man/*' 'info/*' 'locale/*' 'lintian/*' 'doc/*')
mmdebstrap --quiet ${arch:+"--arch=$arch"} --variant=minbase --include="$packages" \
  --aptopt='APT::Install-Recommends "false"' "${excluded[@]/#/--dpkgopt=path-exclude=/usr/share/}" \
  --dpkgopt='path-include=/usr/share/doc/*/copyright' bookworm - | docker import ${arch:+"--platform=linux/$arch"} --change 'CMD ["python3"]' - "$tag" >/dev/null
echo "base: made $tag"
