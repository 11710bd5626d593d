"""Will the kernels that were compiled with the image be found: FlashAttention-4's, Triton's?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.backends import backend_named, runs_on
from attnimg.facts import Machine, Reason
from attnimg.machine.host_facts import Check, Host, ShippedKernels
from attnimg.machine.shipped import reasons_against_shipped, reasons_against_shipped_triton

_MENDS = {
    "kernels-arch": "run the image that is made for this GPU",
    "kernels-mixed-gpus": "choose alike ones with CUDA_VISIBLE_DEVICES",
    "kernels-driver": "update the host's driver",
    "kernels-packages": "install the image's versions again, or use a fresh image",
    "kernels-settings": "unset them, unless they are meant",
}


def check_shipped_kernels(machine: Machine, host: Host) -> Iterator[Check]:
    """Say hit or miss, and for a miss each reason; nothing without such kernels or a GPU."""
    if machine.arch.vendor != "nvidia":
        return
    if fa4 := host.shipped_kernels:
        reasons = reasons_against_shipped(fa4, machine)
        yield _check(fa4, reasons, machine, code="kernels", whose="FlashAttention-4", kind="")
    sage = backend_named("sage")
    if (triton := host.shipped_triton) and sage and runs_on(sage.needs, machine.arch):
        reasons = reasons_against_shipped_triton(triton, machine)
        yield _check(
            triton, reasons, machine, code="triton-kernels", whose="SageAttention", kind="Triton "
        )


def _check(
    shipped: ShippedKernels,
    reasons: tuple[Reason, ...],
    machine: Machine,
    *,
    code: str,
    whose: str,
    kind: str,
) -> Check:
    against = [(reason.code, reason.text) for reason in reasons]
    if shipped.settings:
        against.append(("kernels-settings", f"set here: {', '.join(shipped.settings)}"))
    if not against:
        arch = machine.arch.name
        what = f"{whose} finds its {kind}kernels for {arch} compiled: {shipped.kernels[arch]}"
        return Check(code=code, status="ok", what=what)
    mends = dict.fromkeys(_MENDS[reason] for reason, _ in against)
    return Check(
        code=code,
        status="warn",
        what=f"{whose} does not use the {kind}kernels compiled with the image, so that each is "
        f"compiled at its first call: {'; '.join(text for _, text in against)}",
        do="; ".join(mends),
    )
