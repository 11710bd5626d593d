"""Plain matrix products and softmax, in PyTorch: slow, exact, runs everywhere."""

from attnimg.facts import Backend, Needs

BACKEND = Backend(
    name="eager",
    rank=90,
    summary="plain PyTorch attention",
    packing="mask",
    needs_dtype_cast=False,
    applied_as="eager",
    mask="eager",
    needs=Needs(),
)
