"""What transformers' model classes do not take, without importing transformers.

data/model_classes.toml is read off the pinned transformers by `make classes`.
"""

from __future__ import annotations

import tomllib
from importlib import resources

from attnimg.facts import ModelClass


def class_named(model_type: str) -> ModelClass | None:
    """Give the class of a model type; None when it takes everything, or is not transformers'."""
    path = resources.files("attnimg").joinpath("data", "model_classes.toml")
    found = tomllib.loads(path.read_text(encoding="utf-8")).get(model_type)
    if found is None:
        return None
    return ModelClass(
        name=found["name"],
        lacks=frozenset(found.get("lacks", ())),
        flash_names=tuple(found.get("flash_names", ())),
    )
