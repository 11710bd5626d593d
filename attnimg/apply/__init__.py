"""Apply a plan to a model, and check which attention implementation the model runs."""

from attnimg.apply.model import class_of, facts_of, require_applied, running, switch
from attnimg.apply.registry import prepare, restored
from attnimg.apply.router import backend_of

__all__ = [
    "backend_of",
    "class_of",
    "facts_of",
    "prepare",
    "require_applied",
    "restored",
    "running",
    "switch",
]
