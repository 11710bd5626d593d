#!/bin/bash
# The Python for pip (pip.conf) and uv (UV_PYTHON): that of /opt/venv for a user who may write there, as
# root in a Dockerfile; for others that of /opt/added, which is made at the first install.
set -euo pipefail
added=/opt/added own=/opt/venv/bin/python

[ -w /opt/venv/pyvenv.cfg ] && exec "$own" "$@"
if ! { [ -O "$added/pyvenv.cfg" ] && cmp -s "$added/tested.txt" /etc/pip/tested.txt; }; then
  case " $* $(tr '\0' ' ' </proc/$PPID/cmdline) " in
    *" install "* | *" uninstall "* | *" sync "*) ;;
    *) exec "$own" "$@" ;;
  esac
  "$own" -I /opt/attnimg/image_venv.py "$added" >&2
  echo "attnimg: packages go to $added, which ends with this container unless a volume is mounted there;" \
    "a Dockerfile keeps them: FROM the image, USER root, RUN pip install ..., USER 1000:1000" >&2
fi
case " $* " in
  *" uninstall "*) echo "attnimg: what was installed into $added can be uninstalled; the image's own packages stay" >&2 ;;
esac
# A user's own folder is the default here; in a virtual environment pip refuses to be told so.
unset PIP_USER
arguments=()
for argument; do [ "$argument" = --user ] || arguments+=("$argument"); done
exec "$added/bin/python" "${arguments[@]}"
