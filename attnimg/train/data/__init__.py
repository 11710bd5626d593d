"""Data on its way into training: files and hub names become documents of tokens with labels.

sources -> records -> types -> prepare -> load, and dataset_prepared_path in `cache`. Conversations
take the way conversations -> chat_render -> chat_turn -> chat_layout -> chat.
"""

from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.documents import Documents, SourceFigures, sample_text, sentence
from attnimg.train.data.load import check_sources, load_documents

__all__ = [
    "Documents",
    "SourceFigures",
    "check_sources",
    "choose_chat_template",
    "load_documents",
    "sample_text",
    "sentence",
]
