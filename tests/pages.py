"""The documents' fenced blocks, and what a test does with each.

A comment above a block says what becomes of it where its page is run from top to bottom, in a copy of the tree:

<!-- run -->, <!-- run: words -->  it is run as it stands; the words are put behind each of its commands
<!-- file: path -->                it is written to a file
<!-- edit: path -->                it is a change to a file: lines that go begin with -, those that come with +

Without one, Python is run on its own, and commands are checked without being run: they may need data, a GPU, a network.
A block of text is for the eye alone.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "checkpoints.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMENT = r"(?:<!-- (?P<how>run|file|edit)(?:: (?P<what>[^\n]*?))? -->\n)?"
FENCED = re.compile(rf"^{COMMENT}```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
ASSIGNED = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block; `how` is "run", "file", "edit" or "" and `what` the words behind it."""

    page: str
    language: str
    text: str
    how: str
    what: str

    def commands(self) -> list[list[str]]:
        """The words of its commands, a list each, without what is assigned to the environment before them."""
        lines = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [[word for word in line if not ASSIGNED.fullmatch(word)] for line in lines if line]


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found = FENCED.finditer(path.read_text())
    name = path.relative_to(ROOT).as_posix()
    return [Block(name, m["language"], m["text"], m["how"] or "", m["what"] or "") for m in found]


def everywhere(language: str) -> list[Block]:
    """The blocks of all pages in a language; those that are run behind a change of the tree are of no other."""
    pages = [blocks(path) for path in PAGES]
    return [b for page in pages for b in page if b.language == language and not (b.how and changes(page))]


def changes(page: list[Block]) -> bool:
    """Whether a page changes the tree before it runs commands."""
    return any(block.how in ("file", "edit") for block in page)


def edited(text: str, change: str) -> str:
    """`text` after a change. Raises ValueError unless what it applies to is there once."""
    lines = change.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    if text.count(before) != 1:
        raise ValueError(f"is there {text.count(before)} times, expected once:\n{before}")
    return text.replace(before, after)
