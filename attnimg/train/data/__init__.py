"""Data on its way into training: files and hub names become documents of tokens with labels.

sources -> records -> types -> tokens -> lengths -> documents; `load` strings them together.
"""

from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.check import check_sources
from attnimg.train.data.documents import Documents, SourceFigures, sentence
from attnimg.train.data.load import load_documents
from attnimg.train.data.sample import sample_text

__all__ = [
    "Documents",
    "SourceFigures",
    "check_sources",
    "choose_chat_template",
    "load_documents",
    "sample_text",
    "sentence",
]
