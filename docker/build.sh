#!/usr/bin/env bash
# Build the local image attnimg:NAME (`make build/NAME`) on the base that `make base` made.
#   docker/build.sh NAME [STAGE]    a STAGE of the Dockerfile is tagged attnimg-STAGE:NAME
set -euo pipefail
name=$1 stage=${2:-runtime}
bake=docker/docker-bake.json

fail() { # what, why, do
  printf 'build: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}
fact() { # args or labels, which
  python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))["target"][sys.argv[2]][sys.argv[3]
][sys.argv[4]])' "$bake" "$name" "$@" 2>/dev/null
}

accelerator=$(fact args ACCELERATOR) || fail "there is no image $name" "found no target of that name in \
$bake" "make help, or write recipes/images/$name.toml and make render"
docker info >/dev/null 2>&1 || fail "no Docker engine answers" "docker info fails" "make engine"
needed=$([ "$accelerator" = cpu ] && echo 6 || echo 60)
root=$(docker info --format '{{.DockerRootDir}}')
free=$(df --output=avail -BG "$root" 2>/dev/null | tail -n 1 | tr -dc 0-9 || true)
[ "${free:-$needed}" -ge "$needed" ] || fail "there is no room to build $name" \
  "$root has $free GB free, $needed are needed" "docker builder prune, or docker image prune"

set -- --set "$name.target=$stage" --set "$name.contexts.base=docker-image://attnimg-base:bookworm"
[ "$stage" = runtime ] || set -- "$@" --set "$name.tags=attnimg-$stage:$name"
if [ "$accelerator" = cpu ]; then
  # PyPI's torch is the CUDA build: the CPU one comes from where pip is told to look.
  torch=$(fact labels attnimg.torch) wheels=build/torch-wheel
  compgen -G "$wheels/torch-$torch+cpu-*.whl" >/dev/null || python3.11 -m pip download -q --no-deps \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -d "$wheels" "torch==$torch" || true
  compgen -G "$wheels/torch-$torch+cpu-*.whl" >/dev/null || fail "there is no CPU torch $torch" \
    "pip's own configuration offers none" "make build/$name TORCH_INDEX=<PyTorch's CPU index>"
  set -- "$@" --set "$name.contexts.torch-wheel=$wheels"
fi
exec docker buildx bake --progress="${PROGRESS:-auto}" -f "$bake" "$@" "$name"
