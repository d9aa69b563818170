"""Draw sentences of docs, help, messages and docstrings, for a reader who judges the language.

The commit's hash draws them, so the author cannot choose. The rules are in docs/development.md.

python -m tools.draw_sentences --count 100
"""

import ast
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import click

from qwen_vit.cli.main import COMMANDS, cli
from tools.common import ROOT, head_commit

__all__ = [
    "Sentence",
    "docstring_sentences",
    "help_sentences",
    "message_sentences",
    "page_sentences",
    "sentences_of",
]

PAGES = (
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
)
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# Names in lower case at the start of a sentence.
NAMES = (
    "botocore|filelock|flock|fsspec|glob|hashlib|import-linter|libjpeg|libtiff|mypy|pip|ptxas|pyarrow|"
    "qwen|qwen_vit|s3fs|safetensors|tabulate|tarfile|torch|transformers|vLLM|webdataset"
)
END = re.compile(rf"(?<=[.!?])[)\"*_]*\s+(?=[A-Z0-9(\"*_`]|(?:{NAMES})\b)")
# Calls whose text a user reads: errors, and lines on a terminal.
READ = re.compile(r"\w*Error|print_log|print_data|warn|warning|info|fail|Failure|ClickException")


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Sentence(NamedTuple):
    """Hold a sentence and its place."""

    where: str
    text: str

    @property
    def words(self) -> int:
        """Return the number of words. Code counts as one word."""
        plain = re.sub(r"`[^`]*`|\{[^}]*\}|https?:\S+", "code", self.text)
        return len(re.findall(r"[A-Za-z][\w'\u2019-]*", plain))


def sentences_of(text: str) -> list[str]:
    """Split a paragraph into sentences.

    >>> sentences_of("It reads a file. The file is small, e.g. 3 KB.")
    ['It reads a file.', 'The file is small, e.g. 3 KB.']
    """
    text = " ".join(text.split()).replace("e.g. ", "e.g.\0")
    return [part.replace("\0", " ") for part in END.split(text) if part]


def paragraphs(markdown: str) -> Iterator[str]:
    """Yield the text between blank lines, with each list item, heading and table cell as a separate
    paragraph."""
    text = CODE.sub("", GENERATED.sub("", markdown))
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # keep the words of links
    for block in re.split(r"\n\s*\n", text):
        if block.startswith(":::"):  # for mkdocstrings: the name of a function, and no sentence
            continue
        if block.lstrip().startswith("|"):
            for line in block.splitlines():
                yield from (cell.strip() for cell in line.strip("| ").split(" | "))
        else:
            for part in re.split(r"\n(?=\s*(?:[-*]|\d+\.|:) |#)", block):
                heading, _, rest = part.partition("\n") if part.startswith("#") else ("", "", part)
                yield from filter(None, (heading, rest))


def page_sentences() -> Iterator[Sentence]:
    """Yield the sentences of the README, the pages and the notebooks."""
    texts = [(page, page.read_text("utf-8")) for page in PAGES]
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        texts += [
            (notebook, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"
        ]
    for page, text in texts:
        for paragraph in paragraphs(text):
            plain = re.sub(r"^\s*(?:[-*:#>]+|\d+\.) +", "", paragraph)
            where = str(page.relative_to(ROOT))
            yield from (Sentence(where, sentence) for sentence in sentences_of(plain))


def help_sentences() -> Iterator[Sentence]:
    """Yield the sentences of `qwen-vit --help` and of each command's help."""
    context = click.Context(cli)
    for name in ("", *COMMANDS):
        command = cli.get_command(context, name) if name else cli
        assert command is not None
        where = f"qwen-vit {name} --help".replace("  ", " ")
        texts = [re.sub(r"\x08.*?(?:\n\n|\Z)", "", command.help or "", flags=re.DOTALL)]
        texts += [str(getattr(option, "help", "") or "") for option in command.params]
        for text in texts:
            for paragraph in re.split(r"\n\s*\n", text):
                yield from (Sentence(where, sentence) for sentence in sentences_of(paragraph))


def message_sentences() -> Iterator[Sentence]:
    """Yield the sentences of errors and terminal lines, from the calls that show these texts."""
    for path in sorted((ROOT / "qwen_vit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if not READ.fullmatch(called):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                yield from (Sentence(where, text) for text in sentences_of(literal(argument)))


def docstring_sentences() -> Iterator[Sentence]:
    """Yield the sentences of docstrings, without sessions."""
    for path in sorted((ROOT / "qwen_vit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, DOCUMENTED):
                continue
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
            for block in re.split(r"\n\s*\n|\n(?=\s*- )", ast.get_docstring(node) or ""):
                if block.lstrip().startswith(">>>") or "\x08" in block:
                    continue
                for part in re.split(
                    r"^(?:[A-Z]\w+:\n)? {4,8}[\w, ]+: (?=\S)", block, flags=re.MULTILINE
                ):
                    yield from (Sentence(where, text) for text in sentences_of(part))


def literal(node: ast.expr) -> str:
    """Return a string as written. A value in an f-string is one word."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "`X`"
            for part in node.values
        )
    return ""


@cache
def drawable() -> list[Sentence]:
    """Return the sentences of four words and more, sorted."""
    every = {
        *page_sentences(), *help_sentences(), *message_sentences(), *docstring_sentences()
    }  # fmt: skip
    return sorted(sentence for sentence in every if sentence.words >= 4)


@click.command(help=__doc__)
@click.option("--count", default=100, show_default=True, help="Number of sentences.")
@click.option(
    "--commit",
    default=head_commit,
    help="Commit whose hash selects the sentences.  [default: HEAD]",
)
def main(count: int, commit: str) -> None:
    for sentence in random.Random(commit).sample(drawable(), min(count, len(drawable()))):
        print(f"{sentence.where}: {sentence.text}")


if __name__ == "__main__":
    main()
