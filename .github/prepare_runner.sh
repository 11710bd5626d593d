#!/usr/bin/env bash
# Prepare a hosted runner of GitHub for a large build: remove the toolchains that it brings along, and let the
# Docker engine keep images in containerd's store, which can write a registry cache. Never run yet (2026-11-27).
set -euo pipefail
fail() { # what, why, do
  printf 'prepare_runner: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}
[ "${RUNNER_ENVIRONMENT-}" = github-hosted ] || fail "this is no hosted runner of GitHub" \
  "found RUNNER_ENVIRONMENT=${RUNNER_ENVIRONMENT-}, and it deletes files outside of the checkout" \
  "set prepare = false for this runner in recipes/runners.toml"
df -h /
# Paths that public workflows remove on ubuntu-24.04, by which they free 30 to 40 GB (their words, 2026-11-27).
sudo rm -rf /usr/local/lib/android /usr/share/dotnet /usr/share/swift /usr/local/.ghcup /opt/ghc \
  /opt/hostedtoolcache/CodeQL /usr/local/share/boost /usr/local/julia* /usr/local/share/powershell
sudo docker image prune --all --force
echo '{"features": {"containerd-snapshotter": true}}' | sudo tee /etc/docker/daemon.json
sudo systemctl restart docker
df -h /
# What an image is made of is attested by recipes/release; that store would add a statement of its own to each build.
echo BUILDX_NO_DEFAULT_ATTESTATIONS=1 >>"$GITHUB_ENV"
