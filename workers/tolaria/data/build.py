"""Writes a text as a folder of token ids: `prepare` at a given path, `ensure` in the cache."""

import hashlib
import re
import time
from pathlib import Path

import numpy as np

from esper.platform.console import duration, say
from esper.platform.errors import UserError
from esper.platform.spec import DataSpec
from esper.platform.storage import cache, check_unused, new_folder, write_json
from esper.workers.tolaria.data import sources, tokenizer
from esper.workers.tolaria.data.shards import FILE, VERSION, Manifest, SplitManifest, write_split

CHUNK_DOCUMENTS = 10_000  # encoded at a time, so that only so much is held as ids of 8 bytes
MIN_TOKENS = {"train": 1000, "valid": 100}
SPLITTING = 2  # version of the split into documents and held-out text, for the cache


def prepare(data: DataSpec, out: Path) -> Manifest:
    """Write the new folder `out`: ids, tokenizer and `manifest.json`, whole or not at all."""
    check_unused(out)
    tokenizer.checked_name(data.tokenizer)
    return _write(sources.available(sources.find(data.source)), data, out)


def ensure(data: DataSpec) -> Path:
    """The source's folder of shards, else one in the cache, made if needed; safe to call from several processes."""
    tokenizer.checked_name(data.tokenizer)
    folder = Path(data.source).expanduser()
    if (folder / FILE).exists():
        made_with = Manifest.read(folder).tokenizer
        if made_with != data.tokenizer:
            what = f"the shards in {folder} were made with tokenizer {made_with!r}, {data.tokenizer!r} was asked for"
            raise UserError(f"{what}: ask for {made_with!r}, or make others with `esper prepare`.")
        return folder
    source = sources.find(data.source)
    if not _cached(source, data).exists():
        source = sources.available(source)  # perhaps the stand-in, which is cached under its own name
    folder = _cached(source, data)
    if not folder.exists():
        _write(source, data, folder)
    return folder


def _cached(source: sources.Source, data: DataSpec) -> Path:
    """The cache folder, whose name has a hash of all that decides its content."""
    options = data.tokenizer, data.valid_fraction, data.max_bytes
    key = (VERSION, SPLITTING, source.name, source.fingerprint, *options)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).stem}-{data.tokenizer}")
    return cache("data") / f"{stem}-{digest}"


def _write(source: sources.Source, data: DataSpec, out: Path) -> Manifest:
    started = time.perf_counter()
    splits = dict(zip(("train", "valid"), sources.split(source, data.valid_fraction, data.max_bytes), strict=True))
    say(f"{source.name}: {len(splits['train']):,} training and {len(splits['valid']):,} validation documents")
    encoder = tokenizer.build(data.tokenizer, splits["train"])
    with new_folder(out) as folder:
        made = Manifest(
            version=VERSION,
            source=source.name,
            tokenizer=encoder.name,
            tokenizer_fingerprint=encoder.fingerprint,
            vocab_size=encoder.vocab_size,
            valid_fraction=data.valid_fraction,
            max_bytes=data.max_bytes or source.max_bytes,
            splits={name: _write_split(folder, name, texts, encoder) for name, texts in splits.items()},
        )
        encoder.save(folder)
        write_json(folder / FILE, made.model_dump(mode="json"))
    counts = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in made.splits.items())
    say(f"{encoder.name}: {encoder.vocab_size:,} ids; {counts}, in {duration(time.perf_counter() - started)}")
    if unseen := made.splits["valid"].unseen:
        say(f"valid: {unseen:,} characters do not occur in the training text and share one id")
    return made


def _write_split(folder: Path, name: str, documents: list[str], encoder: tokenizer.Tokenizer) -> SplitManifest:
    chunks = (documents[start : start + CHUNK_DOCUMENTS] for start in range(0, len(documents), CHUNK_DOCUMENTS))
    dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
    ids = np.concatenate([np.empty(0, dtype), *(encoder.encode_documents(chunk).astype(dtype) for chunk in chunks)])
    if len(ids) < MIN_TOKENS[name]:
        what = f"the {name} text has {len(ids)} tokens, and at least {MIN_TOKENS[name]:,} are needed"
        raise UserError(f"{what}: give more text, or change valid_fraction or max_bytes.")
    return SplitManifest(
        documents=len(documents),
        tokens=len(ids),
        characters=sum(map(len, documents)),
        bytes=sum(len(document.encode()) for document in documents),
        unseen=0 if encoder.unseen_id is None else int((ids == encoder.unseen_id).sum()),
        sha256=write_split(folder, name, ids),
    )
