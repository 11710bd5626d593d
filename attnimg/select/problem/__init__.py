"""What a model's config.json says of its attention, read without transformers."""

from attnimg.select.problem.files import find_config, read_config
from attnimg.select.problem.geometry import attention_dropout, read_model

__all__ = ["attention_dropout", "find_config", "read_config", "read_model"]
