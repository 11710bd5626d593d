#!/usr/bin/env bash
# Let this machine run programs for another processor, in containers too: docker/qemu.sh arm64
# Changes nothing where it can; otherwise installs Debian's qemu-user-static, binfmt-support and arch-test, as root.
set -euo pipefail
arch=$1
declare -A names=([amd64]=x86_64 [arm64]=aarch64)

# Docker Desktop's engine has it built in.
can_run() {
  { command -v arch-test && arch-test "$arch"; } >/dev/null || docker buildx inspect 2>/dev/null | grep -q "linux/$arch"
}

if can_run; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  printf 'qemu: %s\n  why: %s\n  do:  %s\n' "this machine can't run programs for $arch" \
    "neither arch-test nor docker buildx inspect says so; installing qemu-user-static needs root, on Debian" \
    "as root: apt-get install qemu-user-static binfmt-support arch-test" >&2
  exit 1
fi
echo "qemu: installing the packages qemu-user-static, binfmt-support and arch-test, to run programs for $arch"
apt-get update -q >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends qemu-user-static binfmt-support arch-test >/dev/null
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
update-binfmts --enable "qemu-${names[$arch]}"
can_run || {
  printf 'qemu: %s\n  why: %s\n  do:  %s\n' "this machine can't run programs for $arch" \
    "qemu-${names[$arch]} is installed, and $(arch-test "$arch" 2>&1 || true)" "update-binfmts --display qemu-${names[$arch]}" >&2
  exit 1
}
