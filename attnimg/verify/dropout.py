"""Prove that attention dropout is honoured, forward and backward.

Dropout is random, but with the identity as v the output is the attention weights themselves: which
were dropped can be read off it, and the reference can drop the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from attnimg.facts import AttentionFunction, Backend, Geometry, Reason
from attnimg.verify.cases import Case
from attnimg.verify.checks import Fault, check_values, expected
from attnimg.verify.inputs import draw
from attnimg.verify.one_call import backward, forward, forward_only, reference

# flash-attn compares 8 random bits with p, so that its rate is p to 1 in 256.
# Source: flash-attn 2.8.3.post2, csrc/flash_attn/src/flash.h, p_dropout_in_uint8_t (2026-11-21).
COARSEST_RATE = 1 / 256
# Where two masks are equal by chance with a probability from here on, they are not compared.
BY_CHANCE = 1e-9


def check_dropout(
    function: AttentionFunction, backend: Backend, geometry: Geometry, *, device: str, seed: int
) -> Iterator[Fault]:
    """Call a backend with dropout and compare with the reference that drops the same weights.

    A kernel whose rate is right is 5 standard deviations off in one of 1.7 million seeds. It would
    be so again with the same seed, which is why each further call of this probe has another one.
    """
    length = min(geometry.head_dim_v, 64)
    small = replace(geometry, softcap=None, sinks=False, window=None)
    case = Case(
        name=f"{length} tokens, dropout {geometry.dropout:g}",
        geometry=small,
        lengths=(length,),
        packed=geometry.packing,
        scale_factor=0.2,
    )
    inputs = draw(case, device=device)
    identity = torch.eye(length, geometry.head_dim_v, device=device, dtype=inputs.v.dtype)
    inputs = replace(inputs, q=inputs.q * 0.2, v=identity.expand_as(inputs.v).contiguous())
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        found = backward(forward(function, backend, case, inputs, dropout=geometry.dropout))
        again = forward_only(forward(function, backend, case, inputs, dropout=geometry.dropout))
    causal = torch.ones(length, length, device=device).tril().bool()
    kept_BHTS, kept_again = (
        (out.transpose(1, 2)[..., :length] != 0).double() for out in (found.out, again.out)
    )
    same = (geometry.dropout**2 + (1 - geometry.dropout) ** 2) ** (length * (length + 1) // 2)
    first, *others = kept_BHTS.unbind(1)
    if same < BY_CHANCE:
        whose = "two calls" if torch.equal(kept_BHTS, kept_again) else "two heads"
        if whose == "two calls" or any(torch.equal(first, other) for other in others):
            text = f"{case.name}: {whose} dropped the same weights"
            yield Fault(reason=Reason(code="dropout", text=text), noise_sensitive=True)
    rate = 1 - kept_BHTS[..., causal].mean().item()
    n_weights = kept_BHTS[..., causal].numel()
    spread = math.sqrt(geometry.dropout * (1 - geometry.dropout) / n_weights)
    if abs(rate - geometry.dropout) > 5 * spread + COARSEST_RATE:
        text = f"{case.name}: {rate:.1%} of the weights were dropped"
        yield Fault(reason=Reason(code="dropout", text=text), noise_sensitive=True)
        return
    keep = kept_BHTS / (1 - geometry.dropout)
    exact = reference(case, inputs, dtype=torch.float64, keep=keep)
    plain = reference(case, inputs, dtype=inputs.q.dtype, keep=keep.to(inputs.q.dtype))
    right = expected(exact, plain)
    yield from check_values(backend, case, inputs, found=found, right=right)[1]
