"""Have a machine's GPU find the kernels that came with the image, and the right ones of a package.

A run sets the variables for itself; `python -m attnimg.machine.kernel_cache` prints them as shell
commands, which docker/entrypoint.sh runs for programs that are not attnimg's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from attnimg.facts import Machine
from attnimg.machine.kernel_cache.fa4 import fa4_settings
from attnimg.machine.kernel_cache.triton import triton_settings
from attnimg.machine.kernel_cache.variants import variant_settings


def use_shipped_kernels(machine: Machine) -> None:
    """Set the variables for this process and its children; call it before flash_attn's import."""
    os.environ.update(settings_for(machine, os.environ))


def settings_for(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Copy what is to be copied, and give the variables to set; none where there is nothing.

    Raises:
        AttnimgError: the manifest of the image's kernels can't be read.
    """
    return {
        **variant_settings(machine, environment),
        **fa4_settings(machine, environment),
        **triton_settings(machine, environment),
    }
