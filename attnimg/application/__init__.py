"""Apply a plan to a model, and check which attention implementation the model runs."""

from attnimg.application.model import class_of, facts_of, require_applied, running, switch
from attnimg.application.registry import prepare, registered, restored, unregister
from attnimg.application.router import backend_of

__all__ = [
    "backend_of",
    "class_of",
    "facts_of",
    "prepare",
    "registered",
    "require_applied",
    "restored",
    "running",
    "switch",
    "unregister",
]
