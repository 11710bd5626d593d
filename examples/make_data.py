"""Remake the texts in examples/data from two Debian packages, byte for byte.

    apt-get download dict-devil=1.0-13.1 bible-kjv-text=4.38
    python examples/make_data.py FOLDER_WITH_THE_TWO_DEBS

Python's own library alone is used. examples/data/README.md says where the texts come from.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

from debian_texts import read_bible, read_dictionary

DATA = Path(__file__).parent / "data"
CONVERSATIONS = 300
# Pairs of answers, of definitions of at most so many characters.
PREFERENCES, LONGEST_ANSWER = 200, 240

Record = dict[str, str]

# The package's abbreviations, in the order of its text, and the names of the books.
BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers",
    "Deu": "Deuteronomy", "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth", "1Sm": "1 Samuel",
    "2Sm": "2 Samuel", "1Ki": "1 Kings", "2Ki": "2 Kings", "1Chr": "1 Chronicles",
    "2Chr": "2 Chronicles", "Ezra": "Ezra", "Neh": "Nehemiah", "Est": "Esther", "Job": "Job",
    "Psa": "Psalms", "Prv": "Proverbs", "Eccl": "Ecclesiastes", "SSol": "Song of Solomon",
    "Isa": "Isaiah", "Jer": "Jeremiah", "Lam": "Lamentations", "Eze": "Ezekiel", "Dan": "Daniel",
    "Hos": "Hosea", "Joel": "Joel", "Amos": "Amos", "Obad": "Obadiah", "Jonah": "Jonah",
    "Mic": "Micah", "Nahum": "Nahum", "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai",
    "Zec": "Zechariah", "Mal": "Malachi", "Mat": "Matthew", "Mark": "Mark", "Luke": "Luke",
    "John": "John", "Acts": "Acts", "Rom": "Romans", "1Cor": "1 Corinthians",
    "2Cor": "2 Corinthians", "Gal": "Galatians", "Eph": "Ephesians", "Phi": "Philippians",
    "Col": "Colossians", "1Th": "1 Thessalonians", "2Th": "2 Thessalonians", "1Tim": "1 Timothy",
    "2Tim": "2 Timothy", "Titus": "Titus", "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James",
    "1Pet": "1 Peter", "2Pet": "2 Peter", "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John",
    "Jude": "Jude", "Rev": "Revelation",
}  # fmt: skip

# "ABASEMENT, n.  A decent and ...": the word, its part of speech, its definition. Two entries
# lack the comma or the blank, a few have no part of speech, and letters have neither.
HEADING = re.compile(
    r"(?P<word>[A-Z][A-Z'\- ,()]*?(?:(?:or| or) [A-Z]+)?(?:\) [A-Z]+)?|R\.I\.P\.|LL\.D\.)"
    r"(?:,? ?(?:n|adj|adv|v|v\.t|v\.i|x|pp|p\.p|pro|pron|n\.pl)\.(?: and n\.)?|\.|\?|(?<=\.))"
    r"\s+(?P<definition>\S.*)",
    re.DOTALL,
)
LETTER = re.compile(r"(?P<word>[A-Z])(?: \(double U\))?,? (?:is|has|in|the)\b")


def chapters(bible: str) -> Iterator[Record]:
    """Yield one record per chapter: its title, and its verses, one per line, without numbers."""
    title, verses = "", list[str]()
    for line in bible.splitlines()[1:]:
        place, verse = line.split(" ", 1)
        found = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+", place)
        assert found is not None, line
        chapter = f"{BOOKS[found[1]]} {found[2]}"
        if chapter != title and verses:
            yield {"title": title, "text": "\n".join(verses)}
            verses = []
        title = chapter
        verses.append(verse.strip())
    yield {"title": title, "text": "\n".join(verses)}


def entries(index: str, dictionary: str) -> Iterator[str]:
    """Yield each entry of a dictd dictionary once, in the order of its text.

    Args:
        index: lines of headword, offset and length, tab apart, numbers in base 64.
        dictionary: the text that the index points into, ASCII.
    """
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        value = 0
        for digit in text:
            value = value * 64 + digits.index(digit)
        return value

    rows = (line.split("\t") for line in index.splitlines())
    spans = {(number(o), number(n)) for word, o, n in rows if not word.startswith("00database")}
    for offset, length in sorted(spans):
        yield dictionary[offset : offset + length]


def plain_text(entry: str) -> str:
    """Join wrapped lines into paragraphs, keep the lines of a poem, and drop the markup."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", entry.rstrip()):
        lines = [re.sub(r"(?<=\S)  +", " ", line).rstrip() for line in block.splitlines()]
        if all(line.startswith("    ") for line in lines):
            # A poem; what stands far to the right of it is its author.
            poem = [line for line in lines if not line.startswith(" " * 40)]
            author = ["-- " + line.strip() for line in lines if line.startswith(" " * 40)]
            paragraphs.append("\n".join([*textwrap.dedent("\n".join(poem)).splitlines(), *author]))
        else:
            paragraphs.append(re.sub(r"\s+", " ", " ".join(lines)).strip())
    text = "\n\n".join(paragraphs)
    return re.sub(r"[{}]", "", re.sub(r"\b_|_\b|(?<!\w)_|_(?!\w)", "", text))


def definitions(index: str, dictionary: str) -> Iterator[Record]:
    """Yield one alpaca record an entry: "Define abasement." and Bierce's answer."""
    for entry in entries(index, dictionary):
        text = plain_text(entry)
        heading, letter = HEADING.match(text), LETTER.match(text)
        if heading is not None:
            word, definition = heading["word"], heading["definition"]
            word = word if "." in word else word.lower()
        elif letter is not None:
            word, definition = f"the letter {letter['word']}", text
        else:
            raise ValueError(f"an entry without a headword: {text[:60]!r}")
        yield {
            "instruction": f"Define {word.removesuffix('.')}.",
            "input": "",
            "output": definition,
        }


def conversation(record: Record) -> dict[str, list[Record]]:
    """Write a definition as a conversation of two turns."""
    turns = (("user", record["instruction"]), ("assistant", record["output"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def preferences(records: Iterable[Record]) -> Iterator[dict[str, object]]:
    """Yield a question with two answers: its definition, and that of the next short entry."""
    short = [record for record in records if len(record["output"]) <= LONGEST_ANSWER]
    for record, other in islice(pairwise(short), PREFERENCES):
        yield {
            "messages": [{"role": "user", "content": record["instruction"]}],
            "chosen": {"role": "assistant", "content": record["output"]},
            "rejected": {"role": "assistant", "content": other["output"]},
        }


def as_json_lines(records: Iterable[object]) -> str:
    """Write one record a line, as a person would read it."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    """Write examples/data from the two packages in the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Remake examples/data from Debian's packages.")
    parser.add_argument("debs", type=Path, help="folder that holds the two .deb files")
    folder = parser.parse_args().debs
    index, dictionary = read_dictionary(folder)
    alpaca = list(definitions(index, dictionary))
    files: dict[str, Iterable[object]] = {
        "devils_dictionary.jsonl": alpaca,
        "conversations.jsonl": map(conversation, alpaca[:CONVERSATIONS]),
        "preferences.jsonl": preferences(alpaca),
        "kjv.jsonl": chapters(read_bible(folder)),
    }
    DATA.mkdir(exist_ok=True)
    for name, records in files.items():
        (DATA / name).write_text(as_json_lines(records), encoding="utf-8")


if __name__ == "__main__":
    main()
