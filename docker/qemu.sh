#!/usr/bin/env bash
# Let this machine run programs for another processor, in containers too: docker/qemu.sh arm64
# Changes nothing where it can; otherwise installs qemu-user of Debian trixie, binfmt-support and arch-test, as root.
# Not bookworm's: under its qemu 7.2, `import torch` ends with a segmentation fault (torch 2.14.1, 2026-11-28).
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
    "neither arch-test nor docker buildx inspect lists them; installing qemu-user needs root, on Debian" \
    "as root: apt-get install qemu-user qemu-user-binfmt binfmt-support arch-test, of Debian trixie" >&2
  exit 1
fi
echo "qemu: installing qemu-user and qemu-user-binfmt of Debian trixie, binfmt-support and arch-test, to run programs for $arch"
"$(dirname "$0")/trixie.sh" >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends qemu-user/trixie \
  qemu-user-binfmt/trixie binfmt-support arch-test >/dev/null
mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
update-binfmts --enable "qemu-${names[$arch]}"
can_run || {
  printf 'qemu: %s\n  why: %s\n  do:  %s\n' "this machine can't run programs for $arch" \
    "qemu-${names[$arch]} is installed, and $(arch-test "$arch" 2>&1 || true)" "update-binfmts --display qemu-${names[$arch]}" >&2
  exit 1
}
