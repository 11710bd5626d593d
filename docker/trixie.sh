#!/usr/bin/env bash
# On Debian bookworm, add trixie's packages, with a low pin so that nothing is upgraded; else do nothing.
set -euo pipefail
[ -e /etc/apt/sources.list.d/trixie.sources ] && exit 0
mirror=$(apt-get indextargets --format "\$(REPO_URI)" 'Created-By: Packages' \
  'Codename: bookworm' 2>/dev/null | head -n 1 || true)
[ -n "$mirror" ] || exit 0
printf '%s\n' 'Types: deb' "URIs: $mirror" 'Suites: trixie' 'Components: main' \
  'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' >/etc/apt/sources.list.d/trixie.sources
printf '%s\n' 'Package: *' 'Pin: release n=trixie' 'Pin-Priority: 50' >/etc/apt/preferences.d/trixie
apt-get update -q
