#!/usr/bin/env bash
# Prepare a GitHub-hosted runner for a large build: remove its preinstalled toolchains, and switch the Docker engine
# to containerd's image store, which can write a registry cache. It has never run yet (2026-11-27).
set -euo pipefail
fail() { # what, why, do
  printf 'prepare_runner: %s\n  why: %s\n  do:  %s\n' "$@" >&2
  exit 1
}
[ "${RUNNER_ENVIRONMENT-}" = github-hosted ] || fail "this is not a GitHub-hosted runner" \
  "found RUNNER_ENVIRONMENT=${RUNNER_ENVIRONMENT-}, and it deletes files outside of the checkout" \
  "set prepare = false for this runner in recipes/runners.toml"
df -h /
# Paths that public workflows remove on ubuntu-24.04; they report 30 to 40 GB of freed space (2026-11-27).
sudo rm -rf /usr/local/lib/android /usr/share/dotnet /usr/share/swift /usr/local/.ghcup /opt/ghc \
  /opt/hostedtoolcache/CodeQL /usr/local/share/boost /usr/local/julia* /usr/local/share/powershell
sudo docker image prune --all --force
echo '{"features": {"containerd-snapshotter": true}}' | sudo tee /etc/docker/daemon.json
sudo systemctl restart docker
df -h /
# What an image is made of is attested by recipes/release; that store would add a statement of its own to each build.
echo BUILDX_NO_DEFAULT_ATTESTATIONS=1 >>"$GITHUB_ENV"
