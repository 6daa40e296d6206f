"""Writes text or images as a folder of prepared data: `prepare` at a given path, `ensure` in the cache."""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from esper.platform.console import duration, say
from esper.platform.data_spec import DataSpec, ImageSpec
from esper.platform.errors import UserError
from esper.platform.storage import cache, check_unused, new_folder, write_json
from esper.workers.tolaria.data import image_sources, images, shards, sources, tokenizer
from esper.workers.tolaria.data.images import ImageData, ImageManifest
from esper.workers.tolaria.data.prepared import FILE, check_kind, kind_of
from esper.workers.tolaria.data.shards import Manifest, SplitManifest, TokenData, write_split

CHUNK_DOCUMENTS = 10_000  # encoded at a time, so that only so much is held as ids of 8 bytes
MIN_TOKENS = {"train": 1000, "valid": 100}
SPLITTING = 2  # version of the split into documents and held-out text, for the cache

Data = TokenData | ImageData  # any kind of prepared data


def prepare(data: DataSpec | ImageSpec, out: Path) -> Manifest | ImageManifest:
    """Write the new folder `out`: arrays and `manifest.json` (and a tokenizer), whole or not at all."""
    check_unused(out)
    of = _sources(data)
    return _write(of.available(of.find(data.source)), data, out)


def ensure(data: DataSpec | ImageSpec) -> Path:
    """The source's folder, else one in the cache, made if needed; safe to call from several processes."""
    of, folder = _sources(data), Path(data.source).expanduser()
    if (folder / FILE).exists():
        _check_made_as(data, folder)
        return folder
    source = of.find(data.source)
    if not _cached(source, data).exists():
        source = of.available(source)  # perhaps a stand-in, which is cached under its own name
    if not (folder := _cached(source, data)).exists():
        _write(source, data, folder)
    return folder


def open_data(path: Path, *, verify: bool = True) -> Data:
    """Prepared data of any kind; UserError where it is damaged, of which `verify` makes sure."""
    return (ImageData if kind_of(path) == "images" else TokenData).open(path, verify=verify)


def _sources(data: DataSpec | ImageSpec) -> Any:
    """The module of the sources of these data."""
    if isinstance(data, ImageSpec):
        return image_sources
    tokenizer.checked_name(data.tokenizer)
    return sources


def _check_made_as(data: DataSpec | ImageSpec, folder: Path) -> None:
    """Raise UserError where the data in `folder` are not of the kind and form that is asked for."""
    check_kind(folder, kind_of(folder), data.kind)
    if isinstance(data, ImageSpec):
        own, asked = ImageManifest.read(folder).size, data.size
        what = f"the images in {folder} were made {own} pixels wide, data.size={asked} was asked for"
    else:
        own, asked = Manifest.read(folder).tokenizer, data.tokenizer
        what = f"the shards in {folder} were made with tokenizer {own!r}, {asked!r} was asked for"
    if asked not in (None, own):
        raise UserError(f"{what}: ask for {own!r}, or make others with `esper prepare`.")


def _cached(source: sources.Source, data: DataSpec | ImageSpec) -> Path:
    """The cache folder, whose name has a hash of all that decides its content."""
    key: tuple[object, ...] = source.name, source.fingerprint
    if isinstance(data, ImageSpec):
        key = images.VERSION, *key, data.size, data.valid_fraction, data.max_images
    else:
        key = shards.VERSION, SPLITTING, *key, data.tokenizer, data.valid_fraction, data.max_bytes
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).stem}-{data.encoding}")
    return cache("data") / f"{stem}-{digest}"


def _write(source: Any, data: DataSpec | ImageSpec, out: Path) -> Manifest | ImageManifest:
    return _write_images(source, data, out) if isinstance(data, ImageSpec) else _write_text(source, data, out)


def _write_images(source: sources.Source[image_sources.Splits], data: ImageSpec, out: Path) -> ImageManifest:
    started = time.perf_counter()
    classes, train, held = image_sources.split(source, data.valid_fraction, data.max_images, data.size)
    with new_folder(out) as folder:
        made = ImageManifest(
            source=source.name,
            classes=classes,
            channels=train.pixels.shape[1],
            size=train.pixels.shape[2],
            mean=tuple(train.pixels.mean(axis=(0, 2, 3)).tolist()),
            deviation=tuple(np.maximum(1, train.pixels.std(axis=(0, 2, 3))).tolist()),
            splits={
                "train": images.write_split(folder, "train", *train),
                "valid": images.write_split(folder, "valid", *held),
            },
        )
        write_json(folder / FILE, made.model_dump(mode="json"))
    say(f"{made}, {made.counts['valid']:,} held out, in {duration(time.perf_counter() - started)}")
    return made


def _write_text(source: sources.Source[sources.Documents], data: DataSpec, out: Path) -> Manifest:
    started = time.perf_counter()
    splits = dict(zip(("train", "valid"), sources.split(source, data.valid_fraction, data.max_bytes), strict=True))
    say(f"{source.name}: {len(splits['train']):,} training and {len(splits['valid']):,} validation documents")
    encoder = tokenizer.build(data.tokenizer, splits["train"])
    with new_folder(out) as folder:
        made = Manifest(
            version=shards.VERSION,
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
