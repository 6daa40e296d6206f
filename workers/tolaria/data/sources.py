"""Sources of text, and the split into training and validation documents."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esper.platform.console import say
from esper.platform.deadline import within
from esper.platform.errors import UserError, unknown
from esper.workers.tolaria.data import files, pydocs

TINYSTORIES = "roneneldan/TinyStories"
HUB_TRAIN_BYTES = 100_000_000  # of 1.9 GB: more than the presets' budgets can read, and a minute or two to fetch
HUB_VALID_BYTES = 2_000_000
PROBE_SECONDS = 4.0  # the hub's own client retries for minutes when nothing answers

Documents = tuple[Iterable[str], Iterable[str] | None]  # training, validation if the source has it


@dataclass(frozen=True)
class Source:
    """A source of documents."""

    name: str  # of `SOURCES`, or an absolute path
    load: Callable[[], Documents]
    fingerprint: str = ""  # changes when the text does
    max_bytes: int | None = None  # of training text, where the caller sets none
    on_hub: bool = False


def _tinystories() -> Documents:
    return hub_texts(TINYSTORIES, "train"), cap(hub_texts(TINYSTORIES, "validation"), HUB_VALID_BYTES)


SOURCES = (
    Source("tinystories", _tinystories, max_bytes=HUB_TRAIN_BYTES, on_hub=True),
    Source("python-docs", lambda: (pydocs.read(), None), fingerprint=sys.version),
)


def find(source: str) -> Source:
    """The source of this name, else the local file or folder; UserError where neither exists."""
    named = {known.name: known for known in SOURCES}
    if source in named:
        return named[source]
    path = Path(source).expanduser()
    if path.exists():
        return Source(str(path.resolve()), partial(files.read, path), files.fingerprint(path))
    if path.suffix in files.READERS or len(path.parts) != 1:
        raise UserError(f"there is no file or folder {source}: check the path, or name one of {', '.join(named)}.")
    raise unknown("source", source, [*named, "a path"])


def available(source: Source) -> Source:
    """`source`, or python-docs, with a message, when its text cannot be had now."""
    if not source.on_hub or hub_answers(TINYSTORIES):
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


def hub_texts(repo: str, split: str) -> Iterator[str]:
    """Stream the column `text` of a data set's split; downloads only what is consumed, and stores nothing."""
    import datasets  # a second to import, and needed by this source alone
    import huggingface_hub

    datasets.logging.set_verbosity_error()  # no warnings of retries
    huggingface_hub.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        for row in datasets.load_dataset(repo, split=split, streaming=True):
            yield row["text"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{repo} ({split}) could not be read from the hub ({type(error).__name__}: {error}): "
            "try again, or name a text file, a folder or python-docs."
        ) from None


def split(source: Source, valid_fraction: float, max_bytes: int | None) -> tuple[list[str], list[str]]:
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
        if max_bytes is not None:
            total += len(document.encode())
            if total > max_bytes:
                return
        yield document


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split off `fraction` of the characters: the documents with the smallest hashes, or the end of a running text.

    Equal documents stay together; held-out ones are in hash order. A single document is cut as a running text is.
    """
    running = [document for document in documents if isinstance(document, files.Piece)]
    hashed = [(hashlib.sha256(d.encode()).digest(), d) for d in documents if not isinstance(d, files.Piece)]
    wanted, total, last = fraction * sum(len(document) for _, document in hashed), 0, b""
    for digest, document in sorted(hashed):
        if total >= wanted:
            break
        total, last = total + len(document), digest
    kept = [document for digest, document in hashed if digest > last]
    held = [document for digest, document in sorted(hashed) if digest <= last]
    if held and not kept:
        running, held = [piece for document in documents for piece in files.pieces(document)], []
    left = round((1 - fraction) * sum(map(len, running)))  # characters until the block begins, within a piece
    for piece in running:
        kept.append(piece[: max(0, left)])
        held.append(piece[max(0, left) :])
        left -= len(piece)
    return list(filter(str.strip, kept)), list(filter(str.strip, held))
