"""Tokenize preference data: a row is a prompt with two answers, or for KTO with one and a label.

The tokens are those that TRL's trainers would compute: prompt and answer are tokenized together,
and an answer begins where the tokens of the prompt alone end.
Source: trl 1.16.0, dpo_trainer.py, kto_trainer.py and orpo_trainer.py, _prepare_dataset,
tokenize_row; axolotl 0.19.0, utils/data/rl.py, and core/trainers/dpo/trainer.py (2026-11-27)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from attnimg.config.schema import Config, is_chat, type_name
from attnimg.errors import AttnimgError, printable
from attnimg.train.data.chat_render import Renderer, TemplateError
from attnimg.train.data.chat_templates import TemplateLimitError, choose_chat_template
from attnimg.train.data.prepare import (
    BATCH_RECORDS,
    Prepared,
    SourceFigures,
    Tally,
    place_text,
    read_shard,
)
from attnimg.train.data.records import IGNORE_INDEX, Place, bad_file, bad_record
from attnimg.train.data.sources import Source
from attnimg.train.preferences.checks import equal_answers
from attnimg.train.preferences.records import Preference, choose_preference_parser

if TYPE_CHECKING:
    import pyarrow

SAMPLE_TOKENS = 200  # the most that are shown of a prompt or answer, to fit on a screen

# Replaces the question when an answer is rendered alone.
_QUESTION = "[[dummy_message]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The tokens of a prompt and its answers.

    Attributes:
        prompt: tokens of the prompt.
        answers: tokens of each answer.
        desirable: for KTO, whether the answer is desirable.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    desirable: bool | None = None

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longest answer."""
        return len(self.prompt) + max(map(len, self.answers))

    def columns(self) -> tuple[list[int], list[int], list[int]]:
        """Return all tokens, the labels of the answers, and the lengths of prompt and answers.

        For KTO, the last length is 1 for a desirable answer and 0 for another.
        """
        answers = [token for answer in self.answers for token in answer]
        parts = [len(self.prompt), *map(len, self.answers)]
        if self.desirable is not None:
            parts.append(int(self.desirable))
        labels = [IGNORE_INDEX] * len(self.prompt) + answers
        return self.prompt + answers, labels, parts


def split_row(example: dict[str, Any]) -> Row:
    """Return the tokens of a row of the dataset, as `Row.columns` joined them."""
    ids, (prompt, first, last) = example["input_ids"], example["parts"]
    if len(ids) == prompt + first:
        return Row(prompt=ids[:prompt], answers=(ids[prompt:],), desirable=bool(last))
    middle = prompt + first
    return Row(prompt=ids[:prompt], answers=(ids[prompt:middle], ids[middle:]))


def preference_schema() -> pyarrow.Schema:
    """Return the columns of preference data: those of documents, and parts, list<int32>."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    text = pyarrow.string()
    return pyarrow.schema([("input_ids", ids), ("labels", ids), ("parts", ids), ("place", text)])


def prepare_preferences(
    source: Source,
    config: Config,
    tokenizer: Any,
    write: Callable[[pyarrow.RecordBatch], object],
) -> Prepared:
    """Write the rows of one source, batch by batch; return its figures and warnings.

    Args:
        source: the source to read.
        config: rl, sequence_len, strategy.
        tokenizer: a transformers tokenizer.
        write: called with each batch of rows, in the order of the records.

    Raises:
        AttnimgError: a record does not fit its type, or the template can't be used.
    """
    import pyarrow

    tally, same, content, read = Tally(), Tally(), hashlib.sha256(), hashlib.sha256()
    parse = choose_preference_parser(source.spec, str(config.rl))
    encoder = PreferenceEncoder.make(source, config, tokenizer)
    records = read_shard(source, seed=config.seed)
    while batch := list(islice(records, BATCH_RECORDS)):
        tally["records"] += len(batch)
        parsed = [(place, parse(record, place)) for place, record in batch]
        for _, value in parsed:
            read.update(repr(value).encode("utf-8", "surrogatepass"))
        kept = []
        for place, row in _fit(encoder(parsed), tally, config):
            if row.desirable is None and row.answers[0] == row.answers[1]:
                same.add("answers", place)
            kept.append((place, row.columns()))
        rows = [row for _, row in kept]
        for column in (column for row in rows for column in row):
            content.update(len(column).to_bytes(8, "little") + array("i", column).tobytes())
        columns = [[row[index] for row in rows] for index in range(3)]
        places = [place_text(place) for place, _ in kept]
        write(pyarrow.record_batch([*columns, places], schema=preference_schema()))
    figures = SourceFigures(
        key=source.key,
        path=source.spec.path,
        type=type_name(source.spec),
        unit="answer" if config.rl == "kto" else "pair",
        sequence_len=config.sequence_len,
        content=content.hexdigest(),
        read=read.hexdigest(),
        places=tally.places,
        **cast("dict[str, Any]", tally),
    )
    return figures, (*encoder.warnings(), *equal_answers(source, same, tally["documents"]))


def _fit(
    encoded: Iterator[tuple[Place, Row]], tally: Tally, config: Config
) -> Iterator[tuple[Place, Row]]:
    """Yield the rows whose prompt fits with each answer into sequence_len tokens; count each.

    The keys of the tally are fields of SourceFigures.

    Raises:
        AttnimgError: a row is longer and excess_length_strategy is "raise".
    """
    most, strategy = config.sequence_len, config.excess_length_strategy or "drop"
    for place, row in encoded:
        tally["longest"] = max(tally["longest"], row.longest)
        if row.longest > most:
            if strategy == "raise":
                raise bad_file(
                    f"record too long: {place}",
                    why=f"found {row.longest:,} tokens of prompt and answer, needed at most "
                    f"sequence_len {most:,}",
                    do=f"set sequence_len: {row.longest}, or excess_length_strategy: truncate or "
                    "drop",
                    key=place.key,
                )
            left = most - len(row.prompt)
            if strategy == "drop" or left < 1:
                tally.add("too_long", place)
                continue
            tally.add("truncated", place)
            answers = tuple(answer[:left] for answer in row.answers)
            row = Row(prompt=row.prompt, answers=answers, desirable=row.desirable)
        tally["documents"] += 1
        trained = sum(map(len, row.answers))
        tally["tokens"] += len(row.prompt) * len(row.answers) + trained
        tally["trained_tokens"] += trained
        yield place, row


class PreferenceEncoder:
    """Turn parsed records into tokens.

    Args:
        tokenizer: a transformers tokenizer.
        renderer: renders messages; None for types without a chat template.
        adds_ids: whether start and end tokens are added by their number, as TRL's ORPOTrainer does,
            not by the tokenizer and as text.
    """

    def __init__(self, tokenizer: Any, renderer: Renderer | None, *, adds_ids: bool) -> None:
        self.tokenizer, self.renderer, self.adds_ids = tokenizer, renderer, adds_ids
        self.merged: str | None = None

    @classmethod
    def make(cls, source: Source, config: Config, tokenizer: Any) -> PreferenceEncoder:
        """Return the encoder of a source.

        Raises:
            AttnimgError: the tokenizer has no end token, or no chat template where one is needed.
        """
        if tokenizer.eos_token_id is None:
            raise AttnimgError(
                "the tokenizer has no end-of-text token",
                why="found none; each answer ends with it, so that the model learns to stop",
                do='set one: `special_tokens: {eos_token: "</s>"}`',
                code="missing-key",
                key="special_tokens",
            )
        renderer = None
        if is_chat(source.spec):
            template = choose_chat_template(config, tokenizer, spec=source.spec, key=source.key)
            # A mapping also has templates for tools, which preference data do not use.
            text = template if isinstance(template, str) else template["default"]
            renderer = Renderer(tokenizer, text)
        return cls(tokenizer, renderer, adds_ids=config.rl == "orpo")

    def warnings(self) -> Iterator[str]:
        """Yield warnings on the records encoded so far."""
        if self.merged is not None:
            yield (
                "some prompts end within a token, so the tokens of the answer begin before its "
                f"text: in {printable(self.merged)!r}; end the prompt where a token ends"
            )

    def __call__(self, batch: Sequence[tuple[Place, Preference]]) -> Iterator[tuple[Place, Row]]:
        """Yield the tokens of each record.

        Raises:
            AttnimgError: the chat template fails on a record, or an answer has no token.
        """
        texts = [self._render(found, place) for place, found in batch]
        prompts = self._tokenize([prompt for prompt, _ in texts])
        joined = [
            f"{prompt}{self._ended(answer)}" for prompt, answers in texts for answer in answers
        ]
        whole = iter(self._tokenize(joined, ends=True))
        for (place, found), (text, answers), prompt in zip(batch, texts, prompts, strict=True):
            tokens = [next(whole) for _ in answers]
            shared = min(_common_prefix(prompt, ids) for ids in tokens)
            if shared < len(prompt):
                self.merged = self.merged or text[-20:]
            row = Row(
                prompt=tokens[0][:shared],
                answers=tuple(ids[shared:] for ids in tokens),
                desirable=found.desirable,
            )
            if not row.prompt:
                why = (
                    "the prompt has no tokens, from which the first token of an answer is predicted"
                )
                raise bad_record(place, why=why, do="write a prompt, or remove the record")
            yield place, row

    def _ended(self, answer: str) -> str:
        """Return an answer with the end token as text, as in DPO and KTO."""
        eos = self.tokenizer.eos_token
        return answer if self.adds_ids or answer.endswith(eos) else answer + eos

    def _tokenize(self, texts: list[str], *, ends: bool = False) -> list[list[int]]:
        """Return the tokens of texts, with the tokens that the trainer adds around them."""
        tokenizer, bos = self.tokenizer, self.tokenizer.bos_token_id
        # verbose: the warning about the model's longest sequence; sequence_len is checked later.
        encoded = tokenizer(texts, add_special_tokens=not self.adds_ids, verbose=False)
        found: list[list[int]] = [list(ids) for ids in encoded["input_ids"]]
        if not self.adds_ids:
            return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in found]
        if bos is not None:
            found = [ids if ids[:1] == [bos] else [bos, *ids] for ids in found]
        eos = tokenizer.eos_token_id
        return [ids if not ends or ids[-1:] == [eos] else [*ids, eos] for ids in found]

    def _render(self, found: Preference, place: Place) -> tuple[str, tuple[str, ...]]:
        """Return the texts of the prompt and of the answers.

        Raises:
            AttnimgError: the template fails on a record, or changes its text.
        """
        if isinstance(found.prompt, str):
            return found.prompt, found.answers
        assert self.renderer is not None
        try:
            prompt = self.renderer.text(found.prompt, prompt=True)
            answers = tuple(
                self._whole_answer(found, prompt, answer, place)
                if found.whole
                else self._answer(answer, place)
                for answer in found.answers
            )
        except (TemplateError, TemplateLimitError) as error:
            do = "correct the record, or set another chat_template"
            why = f"the chat template raised: {error}"
            raise bad_record(place, why=why, do=do) from None
        return prompt, answers

    def _answer(self, answer: str, place: Place) -> str:
        """Return an answer and its end, as the template writes them after a question.

        What the template writes before the text, such as an empty thought, is left out, as in
        axolotl.
        """
        assert self.renderer is not None
        question = {"role": "user", "content": _QUESTION}
        text = self.renderer.text([question, {"role": "assistant", "content": answer}])
        opening = self.renderer.text([question], prompt=True)
        begin = len(opening) if text.startswith(opening) else text.find(_QUESTION) + len(_QUESTION)
        # Some templates remove the blanks around a text.
        at = max(text.find(answer, begin), text.find(answer.strip(), begin))
        if not answer.strip() or at < 0:
            why = f"the chat template does not write the answer {answer[:60]!r}"
            do = "write an answer that is not blank, or set another chat_template"
            raise bad_record(place, why=why, do=do)
        return text[at:].rstrip()

    def _whole_answer(self, found: Preference, prompt: str, answer: str, place: Place) -> str:
        """Return all that the template writes after the prompt."""
        assert self.renderer is not None
        text = self.renderer.text([*found.prompt, {"role": "assistant", "content": answer}])
        if not text.startswith(prompt):
            why = "the chat template writes the prompt in another way when an answer follows"
            raise bad_record(place, why=why, do="set another chat_template")
        return text[len(prompt) :]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are the same at the start of both."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def sample_preference(example: dict[str, Any], tokenizer: Any) -> str:
    """Return the text of a row; control characters are escaped, as for other documents."""
    row = split_row(example)
    names = ("chosen", "rejected")
    if row.desirable is not None:
        names = ("desirable" if row.desirable else "undesirable", "")
    texts = {"prompt": row.prompt, **dict(zip(names, row.answers, strict=False))}
    lines = []
    for name, ids in texts.items():
        part = ids[-SAMPLE_TOKENS:] if name == "prompt" else ids[:SAMPLE_TOKENS]
        text, cut = printable(tokenizer.decode(part)), len(part) < len(ids)
        before, after = ("... ", "") if name == "prompt" else ("", " ...")
        lines.append(f"{name}: {before * cut}{text}{after * cut}")
    shown = "\n".join(lines).replace("\n", "\n    ")
    return f"first record (the answers are compared):\n    {shown}"
