"""The Python API for your own trainer: select a backend for a model, verify it, and apply it.

    choice = attnimg.select("org/model", packing=True, sequence_len=8192)
    with attnimg.use(choice):
        model = AutoModelForCausalLM.from_pretrained(
            "org/model", attn_implementation=choice.implementation
        )
        attnimg.check_packing(model)

or, for a model that is loaded already:

    choice = attnimg.apply(model, packing=True)

Each step is logged by the logger "attnimg" at level INFO; at level WARNING where a backend is
replaced by the next candidate. The command line calls the same functions.
"""

from attnimg.api.applied import apply, check_packing, restore, verify
from attnimg.api.choice import Choice, Settings, select, use

__all__ = [
    "Choice",
    "Settings",
    "apply",
    "check_packing",
    "restore",
    "select",
    "use",
    "verify",
]
