"""Wrong kernels, served as local hub kernels: each is caught, for the right reason.

One child process proves them all, as `verify` would; those that kill it cost one more each.
"""

from __future__ import annotations

import pytest
from served_kernels import serve

from attnimg.facts import Geometry, Proof
from attnimg.prove.runner import Candidate, run

PACKED = Geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, sequence_len=300
)
SINGLE = Geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=300)
HALF = Geometry(
    heads=8, kv_heads=2, head_dim_qk=32, head_dim_v=32, packing=True, dtype="bfloat16",
    sequence_len=256,
)  # fmt: skip
WINDOW = Geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, window=64, sequence_len=300
)
CAPPED = Geometry(
    heads=4, kv_heads=4, head_dim_qk=16, head_dim_v=16, softcap=30.0, sequence_len=200
)
DROPOUT = Geometry(
    heads=4, kv_heads=2, head_dim_qk=32, head_dim_v=32, packing=True, dropout=0.1, sequence_len=64
)

# fault, geometry, the reason that must be told (and none: a right kernel must pass)
FAULTS = [
    ("none", PACKED, None),
    ("none", SINGLE, None),
    ("none", HALF, None),
    ("none", WINDOW, None),
    ("none", CAPPED, None),
    ("none", DROPOUT, None),
    ("zeros", PACKED, "zeros"),
    ("zeros", HALF, "zeros"),
    ("detached", PACKED, "grad-detached"),
    ("no dk", PACKED, "grad-detached"),
    ("scale", PACKED, "numerics-fwd"),
    ("scale ignored", PACKED, "numerics-fwd"),
    ("low precision", PACKED, "numerics-fwd"),
    ("top-left", PACKED, "numerics-fwd"),
    ("no causal mask", PACKED, "numerics-fwd"),
    ("no causal mask", HALF, "numerics-fwd"),
    ("causal one too far", PACKED, "numerics-fwd"),
    ("causal one too far", HALF, "numerics-fwd"),
    ("heads swapped", PACKED, "numerics-fwd"),
    ("heads swapped", HALF, "numerics-fwd"),
    ("base of softmax", PACKED, "numerics-fwd"),
    ("base of softmax", HALF, "numerics-fwd"),
    ("one added", PACKED, "numerics-fwd"),
    ("no maximum", PACKED, "nan"),
    ("no maximum", HALF, "nan"),
    ("nan at 192", PACKED, "nan"),
    ("nan at 192", SINGLE, "nan"),
    ("nan at 37", PACKED, "nan"),
    ("nan at 37", SINGLE, "nan"),
    ("tail", PACKED, "numerics-fwd"),
    ("tail", SINGLE, "numerics-fwd"),
    ("tail", HALF, "numerics-fwd"),
    ("first key lost", PACKED, "numerics-fwd"),
    ("first key lost", HALF, "numerics-fwd"),
    ("wrong from 200 on", SINGLE, "numerics-fwd"),
    ("shape", SINGLE, "numerics-fwd"),
    ("memory layout", PACKED, "numerics-fwd"),
    ("memory layout", SINGLE, "numerics-fwd"),
    ("no window", WINDOW, "numerics-fwd"),
    ("window one too wide", WINDOW, "numerics-fwd"),
    ("window one too narrow", WINDOW, "numerics-fwd"),
    ("no softcap", CAPPED, "numerics-fwd"),
    ("softcap without gradient", CAPPED, "numerics-bwd"),
    ("dv times 1.05", PACKED, "numerics-bwd"),
    ("dq negated", PACKED, "numerics-bwd"),
    ("dq negated", HALF, "numerics-bwd"),
    ("dk nan", PACKED, "nan"),
    ("dq without the tail", PACKED, "numerics-bwd"),
    ("dk of one head in a group", PACKED, "numerics-bwd"),
    ("dk of one head in a group", HALF, "numerics-bwd"),
    ("leak", PACKED, "packing-not-isolated"),
    ("leak", HALF, "packing-not-isolated"),
    ("leak of one token", PACKED, "packing-not-isolated"),
    ("equal documents", PACKED, "packing-not-isolated"),
    ("longer max_seqlen", PACKED, "numerics-fwd"),
    ("documents past 32", PACKED, "numerics-fwd"),
    ("no dropout", DROPOUT, "dropout"),
    ("dropout not rescaled", DROPOUT, "numerics-fwd"),
    ("noise", PACKED, "nondeterministic"),
    ("raise", PACKED, "crash"),
    ("memory", PACKED, "oom"),
    ("abort", PACKED, "crash"),
    ("exit", PACKED, "crash"),
    ("scale", HALF, "numerics-bwd"),
    ("dv times 1.05", HALF, "numerics-bwd"),
    ("leak of one token", HALF, "packing-not-isolated"),
]
NAMES = [f"wrong/kernel-{number}" for number in range(len(FAULTS))]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    root = tmp_path_factory.mktemp("kernels")
    entries = [
        f"{name}={serve(root / name.partition('/')[2], fault)}"
        for name, (fault, _, _) in zip(NAMES, FAULTS, strict=True)
    ]
    candidates = [
        Candidate(backend=name, geometries=(geometry,), trusted=True)
        for name, (_, geometry, _) in zip(NAMES, FAULTS, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", ":".join(entries))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        found = run(candidates, device="cpu")
    return {proof.backend: proof for proof in found}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param(
            name,
            code,
            id=f"{fault}, {'packed' if geometry.packing else 'single'} {geometry.dtype}: "
            f"{code or 'passes'}",
        )
        for name, (fault, geometry, code) in zip(NAMES, FAULTS, strict=True)
    ],
)
def test_each_kernel_is_judged_by_what_is_wrong_with_it(
    proofs: dict[str, Proof], name: str, code: str | None
) -> None:
    codes = [reason.code for reason in proofs[name].reasons]
    assert codes == [] if code is None else code in codes, proofs[name].reasons
