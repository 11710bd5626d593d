"""Load the training data: turn files and hub datasets into tokenized documents with labels.

sources -> records -> types -> prepare -> load; `cache` reads and writes dataset_prepared_path.
Conversations are processed by conversations -> chat_render -> chat_turn -> chat_layout -> chat.
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
