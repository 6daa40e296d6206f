"""From a source's text to a folder of shards: once by name (`prepare`), or through the cache (`ensure`)."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esper.platform.console import duration, say
from esper.platform.errors import UserError
from esper.platform.storage import whole_folder, write_json
from esper.workers.tolaria.data import manifest, sources, tokenizer
from esper.workers.tolaria.data.manifest import Manifest, SplitManifest
from esper.workers.tolaria.data.shards import write_split

CHUNK_CHARACTERS = 8 * 2**20
MIN_TOKENS = {"train": 1000, "valid": 100}


def prepare(
    source: str, tokenizer: str, out: Path, *, valid_fraction: float = 0.1, max_bytes: int | None = None
) -> Manifest:
    """Turn a source's text into the folder `out`: shards, the tokenizer's file and `manifest.json`.

    The folder appears whole or not at all. Progress is printed.

    Args:
        source: name of a source, or path of a .txt, .parquet or .jsonl file or a folder of them.
        tokenizer: `char`, `bpe:N` or `gpt2`.
        out: new or empty folder.
        valid_fraction: of the text, held out by whole documents where the source has no split of its own.
        max_bytes: cap on the training text, in bytes of UTF-8.

    Raises:
        UserError: any of these is not so, or the text is missing, unreadable or too short.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder: name a new one, or delete it first.")
    _check(source, tokenizer, valid_fraction, max_bytes)
    return _write(sources.available(sources.find(source)), tokenizer, out, valid_fraction, max_bytes)


def ensure(source: str, tokenizer: str, *, valid_fraction: float = 0.1, max_bytes: int | None = None) -> Path:
    """The folder of prepared shards for this source and tokenizer, made now if it is not there.

    A folder of prepared shards is returned as it is, whatever its options. Anything else is prepared into the cache
    (`$ESPER_CACHE`, `$XDG_CACHE_HOME/esper` or `~/.cache/esper`), from where it is used again as long as the
    options and the text are the same. Several processes may call this at once.

    Args:
        source: as for `prepare`, or a folder of prepared shards.
        tokenizer: as for `prepare`; prepared shards must have been made with it.
        valid_fraction: as for `prepare`.
        max_bytes: as for `prepare`.

    Raises:
        UserError: as for `prepare`, or the prepared shards are of another tokenizer.
    """
    folder = Path(source).expanduser()
    if (folder / manifest.FILE).exists():
        made_with = Manifest.read(folder).tokenizer
        if made_with != tokenizer:
            raise UserError(
                f"the shards in {folder} were made with tokenizer {made_with!r}, and {tokenizer!r} was asked for: "
                f"ask for {made_with!r}, or make others with `esper prepare`."
            )
        return folder
    _check(source, tokenizer, valid_fraction, max_bytes)
    found = sources.find(source)
    folder = _cached(found, tokenizer, valid_fraction, max_bytes)
    if not folder.exists():
        found = sources.available(found)  # perhaps the stand-in, which is cached under its own name
        folder = _cached(found, tokenizer, valid_fraction, max_bytes)
    if not folder.exists():
        _write(found, tokenizer, folder, valid_fraction, max_bytes)
    return folder


def _check(source: str, tokenizer_name: str, valid_fraction: float, max_bytes: int | None) -> None:
    tokenizer.kind(tokenizer_name)
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction is {valid_fraction}: it must be between 0 and 1, both excluded.")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}: it must be at least 1, or left out for no cap.")
    if (Path(source).expanduser() / manifest.FILE).exists():
        raise UserError(f"{source} holds prepared shards already: use it as it is, or give the text it came from.")


def _cached(source: sources.Source, tokenizer_name: str, valid_fraction: float, max_bytes: int | None) -> Path:
    """Where the cache keeps these shards: readable names, and a hash of all that decides their content."""
    cache = os.environ.get("ESPER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "esper"
    key = (manifest.VERSION, source.name, source.fingerprint(), tokenizer_name, valid_fraction, max_bytes)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).stem}-{tokenizer_name}")
    return Path(cache).expanduser() / "data" / f"{stem}-{digest}"


def _write(
    source: sources.Source, tokenizer_name: str, out: Path, valid_fraction: float, max_bytes: int | None
) -> Manifest:
    started = time.perf_counter()
    train, valid = sources.split(source, valid_fraction, max_bytes)
    documents = {"train": train, "valid": valid}
    for name, split in documents.items():
        if not split:
            raise _too_short(source, name, 0)
    say(f"{source.name}: {len(train):,} training and {len(valid):,} validation documents")
    encoder = tokenizer.kind(tokenizer_name).build(tokenizer_name, train)
    try:
        with whole_folder(out) as folder:
            splits = {name: _write_split(source, folder, name, split, encoder) for name, split in documents.items()}
            encoder.save(folder)
            made = Manifest(
                version=manifest.VERSION,
                source=source.name,
                tokenizer=encoder.name,
                tokenizer_fingerprint=encoder.fingerprint,
                vocab_size=encoder.vocab_size,
                valid_fraction=valid_fraction,
                max_bytes=max_bytes or source.max_bytes,
                splits=splits,
            )
            write_json(folder / manifest.FILE, made.model_dump(mode="json"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out} cannot be written ({reason}): name a folder you may write to.") from None
    counts = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in splits.items())
    say(f"{encoder.name}: {encoder.vocab_size:,} ids; {counts}, in {duration(time.perf_counter() - started)}")
    for name, split in splits.items():
        if split.unseen:
            say(f"{name}: {split.unseen:,} characters do not occur in the training text and share one id")
    return made


def _write_split(
    source: sources.Source, folder: Path, name: str, documents: list[str], encoder: tokenizer.Tokenizer
) -> SplitManifest:
    unseen = 0

    def encoded() -> Iterator[np.ndarray]:
        nonlocal unseen
        for chunk in _chunks(documents):
            ids = encoder.encode_documents(chunk)
            if encoder.unseen_id is not None:
                unseen += int((ids == encoder.unseen_id).sum())
            yield ids

    shards = write_split(folder, name, encoded(), encoder.vocab_size)
    tokens = sum(shard.tokens for shard in shards)
    if tokens < MIN_TOKENS[name]:
        raise _too_short(source, name, tokens)
    return SplitManifest(
        documents=len(documents),
        tokens=tokens,
        characters=sum(map(len, documents)),
        bytes=sum(len(document.encode()) for document in documents),
        unseen=unseen,
        shards=tuple(shards),
    )


def _chunks(documents: list[str]) -> Iterator[list[str]]:
    """Runs of documents of about `CHUNK_CHARACTERS`, so that only so much is held as ids of 8 bytes."""
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _too_short(source: sources.Source, name: str, tokens: int) -> UserError:
    what = {"train": "training", "valid": "validation"}[name]
    return UserError(
        f"the {what} text of {source.name} has {tokens} tokens, and at least {MIN_TOKENS[name]:,} are needed: "
        "give more text (documents separated by <|endoftext|>), or change valid_fraction or max_bytes."
    )
