"""Will FlashAttention-4 find the kernels that were compiled with the image?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.facts import Machine
from attnimg.host_facts import Check, Host
from attnimg.shipped import reasons_against_shipped

_MENDS = {
    "kernels-arch": "run the image that is made for this GPU",
    "kernels-mixed-gpus": "choose alike ones with CUDA_VISIBLE_DEVICES",
    "kernels-driver": "update the host's driver",
    "kernels-packages": "install the image's versions again, or use a fresh image",
    "kernels-settings": "unset them, unless they are meant",
}


def check_shipped_kernels(machine: Machine, host: Host) -> Iterator[Check]:
    """Say hit or miss, and for a miss each reason; nothing without such kernels or a GPU."""
    shipped = host.shipped_kernels
    if shipped is None or machine.arch.vendor != "nvidia":
        return
    against = [(reason.code, reason.text) for reason in reasons_against_shipped(shipped, machine)]
    if shipped.settings:
        against.append(("kernels-settings", f"set here: {', '.join(shipped.settings)}"))
    if not against:
        arch = machine.arch.name
        what = f"FlashAttention-4 finds its kernels for {arch} compiled: {shipped.kernels[arch]}"
        yield Check(code="kernels", status="ok", what=what)
        return
    mends = dict.fromkeys(_MENDS[code] for code, _ in against)
    yield Check(
        code="kernels",
        status="warn",
        what="FlashAttention-4 does not use the kernels compiled with the image, so that each is "
        f"compiled at its first call: {'; '.join(text for _, text in against)}",
        do="; ".join(mends),
    )
