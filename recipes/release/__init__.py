"""Release an image: one pipeline, the same on a laptop and in CI.

    build -> gate -> push (by digest) -> test (pulled) -> attest -> verify -> promote (tags)

steps.py has the order; each step is also a command of its own, with its results in record.py's
file build/release/NAME.json. repository.py and tags.py say where and under which names;
gates_result.py reads what the gates found; publishable.py refuses what may not be pushed;
transfer.py moves images (skopeo); provenance.py and vex.py write what is attested; signing.py signs
and verifies (cosign); clean_engine.py starts a second, empty Docker engine.
"""
