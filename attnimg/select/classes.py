"""Judge whether a transformers model class takes a backend, by what the class says of itself."""

from __future__ import annotations

from attnimg.facts import Backend, ModelClass, Reason

# What transformers asks a class before it takes a name of its own.
# Source: transformers 5.22.2, modeling_utils.py, class PreTrainedModel.
_ASKED = {"sdpa": "sdpa", "flex_attention": "flex"}


def reason_against_class(model_class: ModelClass, backend: Backend) -> Reason | None:
    """Say why a transformers model class cannot run a backend."""
    name = backend.applied_as or backend.name
    if name.startswith("attnimg_"):
        return reason_against_own(model_class, backend.name)
    asked = "flash" if backend.uses_flash_lib or backend.family else _ASKED.get(name)
    if asked in model_class.lacks:
        text = f"transformers' {model_class.name} says that it has no {backend.summary}"
        return Reason(code="model-class", text=text)
    takes = model_class.flash_names
    # transformers replaces any other name with "flash" in it by the first of that list.
    if takes and "flash" in name and name not in takes:
        text = f"transformers' {model_class.name} takes {', '.join(takes)} and would swap {name}"
        return Reason(code="model-class", text=text)
    return None


def reason_of_own_code(model_class: ModelClass, name: str) -> Reason:
    """Return the reason against a kernel where a class has its own attention code."""
    text = f"transformers' {model_class.name} has its own attention code, which can't call {name}"
    return Reason(code="model-class", text=text)


def reason_against_own(model_class: ModelClass, name: str) -> Reason | None:
    """Refuse classes that a function of attnimg's own would not serve.

    transformers takes a registered name for classes with attention code of their own all the same:
    bloom then runs eager without a word, falcon raises KeyError. And it asks no flag of the class:
    a function that gets the padding and no mask, as flash kernels do, would drop the chunks of
    llama4. Seen with transformers 5.22.2 (2026-11-21).

    Args:
        model_class: what the class says of itself.
        name: whose function it is, for people.
    """
    if "others" in model_class.lacks:
        return reason_of_own_code(model_class, name)
    if "flash" in model_class.lacks:
        text = (
            f"transformers' {model_class.name} says that it has no flash attention: its mask says "
            f"more than {name} is told"
        )
        return Reason(code="model-class", text=text)
    return None
