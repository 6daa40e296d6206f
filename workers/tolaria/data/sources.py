"""Sources of text: files and folders, TinyStories on the hub, the installed Python; and what of them is held out."""

import ast
import gc
import hashlib
import os
import sys
import sysconfig
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import UserError, in_a_sentence, like_a_path, unknown

TINYSTORIES = "roneneldan/TinyStories"
HUB_TRAIN_BYTES = 100_000_000  # of 1.9 GB: more than the presets' budgets can read, and a minute or two to fetch
HUB_VALID_BYTES = 2_000_000
PROBE_SECONDS = 4.0  # the hub's own client retries for minutes when nothing answers
SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 2000
# Of the installed Python: some distributions leave out the test suites; the rest is not English.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data"}

TABLES = {  # how a table is read whole
    ".parquet": lambda path: pq.ParquetFile(path).read(),
    ".jsonl": partial(pj.read_json, read_options=pj.ReadOptions(block_size=64 * 2**20)),  # bytes: a line's most
}
KINDS = (".txt", *TABLES)

Documents = tuple[Iterable[str], Iterable[str] | None]  # training, validation if the source has it
Content = TypeVar("Content")


@dataclass(frozen=True)
class Source(Generic[Content]):
    """A source of documents, or of images."""

    name: str  # of `SOURCES`, or an absolute path
    load: Callable[[], Content]
    fingerprint: str = ""  # changes when the content does
    max_bytes: int | None = None  # of training text, where the caller sets none


def _tinystories() -> Documents:
    return hub_texts(TINYSTORIES, "train"), cap(hub_texts(TINYSTORIES, "validation"), HUB_VALID_BYTES)


SOURCES: tuple[Source[Documents], ...] = (
    Source("tinystories", _tinystories, max_bytes=HUB_TRAIN_BYTES),
    Source("python-docs", lambda: (python_docs(), None), fingerprint=sys.version),
)


def find(source: str) -> Source[Documents]:
    """The source of this name, else the local file or folder; UserError where neither exists."""
    return found(source, SOURCES, _files)


def found(source: str, known: Sequence[Source[Content]], of_path: Callable[[Path], Source[Content]]) -> Source[Content]:
    """The one of the `known` sources with a name, else what `of_path` makes of a local file or folder."""
    named, path = {each.name: each for each in known}, Path(source).expanduser()
    if source not in named and not path.exists():
        if like_a_path(source):
            raise UserError(f"{source} does not exist: name a file or folder, or one of {', '.join(sorted(named))}.")
        raise unknown("source", source, [*named, "an existing file or folder"])
    return named[source] if source in named else of_path(path)


def available(source: Source[Documents]) -> Source[Documents]:
    """`source`, or python-docs, with a message, when its text cannot be had now."""
    if source.name != "tinystories" or hub_answers(TINYSTORIES):
        return source
    say(f"{source.name} needs the Hugging Face hub, which does not answer: using python-docs instead.")
    return find("python-docs")


def hub_answers(repo: str) -> bool:
    """Whether the Hugging Face hub (or `$HF_ENDPOINT`) knows the data set `repo`."""
    import huggingface_hub  # half a second to import

    hub = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        within(PROBE_SECONDS, lambda: hub.dataset_info(repo, timeout=PROBE_SECONDS))
    except Exception:  # offline, an unknown host, refused, TLS, a timeout, a malformed endpoint: of several libraries
        return False
    return True


def hub_rows(repo: str, split: str, columns: Sequence[str], instead: str) -> Iterator[list[Any]]:
    """Stream columns of a data set's split; downloads only what is consumed, and stores nothing."""
    import datasets  # a second to import, and needed by the hub's sources alone
    import huggingface_hub

    datasets.logging.set_verbosity_error()  # no warnings of retries
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with in_a_sentence(f"{repo} ({split}) could not be read from the hub", f"try again, or name {instead}"):
        for row in datasets.load_dataset(repo, split=split, streaming=True):
            yield [row[column] for column in columns]  # pyright: ignore[reportArgumentType, reportCallIssue]


def hub_texts(repo: str, split: str) -> Iterator[str]:
    """Stream the column `text` of a data set's split."""
    return (text for (text,) in hub_rows(repo, split, ["text"], "a text file, a folder or python-docs"))


def python_docs() -> Iterator[str]:
    """The installed Python's language reference and docstrings, 2 MB, by hash: any prefix is a fair sample."""
    from pydoc_data.topics import topics  # half a megabyte, needed here alone

    documents = [topic.strip() for topic in topics.values()]
    root = Path(sysconfig.get_paths()["stdlib"])
    gc.freeze()  # or half of the time goes into looking through torch's objects again and again
    for folder, inside, files in os.walk(root):
        inside[:] = set(inside) - SKIPPED
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            documents += module_docs(path, ".".join(parts).removesuffix(".__init__"))
    gc.unfreeze()
    yield from sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def module_docs(path: Path, module: str) -> Iterator[str]:
    """The module's docstring, and a document per class or function in it; nothing is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template, or source of another Python
            return
    doc = ast.get_docstring(tree)
    documents = [f"{module}\n{doc}" if doc else "", *("\n\n".join(_docstrings(node, module)) for node in tree.body)]
    for document in filter(None, documents):
        yield document.encode("utf-8", "replace").decode()  # escapes may be lone surrogates


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = f"{prefix}.{node.name}"
        if doc := ast.get_docstring(node):
            yield f"{name}\n{doc}"
        for child in node.body:
            yield from _docstrings(child, name)


def _read(path: Path) -> Documents:
    """`train*` and `valid*` of a folder with both, else (all files, None)."""
    found = _text_files(path)
    train, valid = ([file for file in found if file.name.startswith(name)] for name in ("train", "valid"))
    if train and valid:
        return chain.from_iterable(map(read_file, train)), chain.from_iterable(map(read_file, valid))
    return chain.from_iterable(map(read_file, found)), None


def _files(path: Path) -> Source[Documents]:
    return Source(str(path.resolve()), partial(_read, path), files_fingerprint(_text_files(path)))


def _text_files(path: Path) -> list[Path]:
    """The file at `path`, or those directly in the folder, by name."""
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")
    if texts := [file for file in found if file.suffix in KINDS]:
        return texts
    raise UserError(f"{path} holds no text: give a .txt, .parquet or .jsonl file, or a folder with such files in it.")


def files_fingerprint(files: Iterable[Path]) -> str:
    """A hash of the paths, sizes and modification times of the files."""
    stats = [(file.resolve(), file.stat()) for file in files]
    lines = "".join(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for file, stat in stats)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_file(path: Path) -> Iterator[str]:
    """A file's documents without nulls; UserError where it is damaged or has no one column of texts."""
    rule = "write it anew, in UTF-8 and with each text under 'text'"
    with in_a_sentence(f"{path} is no whole {path.suffix} file", rule):
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8-sig")
            yield from map(str.strip, text.split(SEPARATOR)) if SEPARATOR in text else pieces(text)
            return
        table = TABLES[path.suffix](path)
        strings = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        if "text" not in strings and len(strings) != 1:
            names = ", ".join(table.column_names)
            raise ValueError(f"of {names} none is called 'text', and {len(strings)} hold strings")
        for chunk in table["text" if "text" in strings else strings[0]].chunks:
            yield from chunk.drop_null().to_pylist()


class Piece(str):
    """A part of a running text without document marks."""

    __slots__ = ()


def pieces(text: str) -> Iterator[Piece]:
    """Pieces of 2,000 to 4,000 characters, cut at a blank line, else a line's end, else a space."""
    start = 0
    while start < len(text):
        least, most = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        cuts = (text.find(boundary, least, most) for boundary in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut >= 0), most)
        yield Piece(text[start:end].strip())
        start = end


def split(source: Source[Documents], valid_fraction: float, max_bytes: int | None) -> tuple[list[str], list[str]]:
    """Training (`max_bytes` of UTF-8 at most) and validation documents, disjoint unless the source splits itself."""
    limit = max_bytes or source.max_bytes
    train, valid = source.load()
    if valid is not None:
        return list(cap(train, limit)), list(cap(valid, None))
    kept, held = hold_out(list(cap(train, limit and round(limit / (1 - valid_fraction)))), valid_fraction)
    return list(cap(kept, limit)), held


def cap(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """The leading documents with at most `max_bytes` bytes of UTF-8 together, blank ones left out."""
    total = 0
    for document in filter(str.strip, documents):
        total += len(document.encode())
        if max_bytes is not None and total > max_bytes:
            return
        yield document


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split off `fraction` of the characters: the documents with the smallest hashes, or the end of a running text.

    Equal documents stay together; held-out ones are in hash order. A single document is cut as a running text is.
    """
    running = [document for document in documents if isinstance(document, Piece)]
    whole = [document for document in documents if not isinstance(document, Piece)]
    hashed = sorted(whole, key=lambda document: hashlib.sha256(document.encode()).digest())
    ends = list(accumulate(map(len, hashed)))
    chosen = set(hashed[: bisect_left(ends, fraction * sum(map(len, whole))) + 1])
    kept, held = [text for text in whole if text not in chosen], [text for text in hashed if text in chosen]
    if held and not kept:
        running, held = [piece for document in documents for piece in pieces(document)], []
    left = round((1 - fraction) * sum(map(len, running)))  # characters until the block begins, within a piece
    for piece in running:
        kept.append(piece[: max(0, left)])
        held.append(piece[max(0, left) :])
        left -= len(piece)
    return list(filter(str.strip, kept)), list(filter(str.strip, held))
