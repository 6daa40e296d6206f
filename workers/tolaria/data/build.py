"""Writes text or images as a folder of prepared data: `prepare` at a given path, `ensure` in the cache."""

import hashlib
import re
import time
from pathlib import Path

import numpy as np

from esper.platform.console import duration, say
from esper.platform.errors import UserError
from esper.platform.spec import DataSpec, ImageSpec
from esper.platform.storage import cache, check_unused, new_folder, write_json
from esper.workers.tolaria.data import image_sources, images, shards, sources, tokenizer
from esper.workers.tolaria.data.images import ImageData, ImageManifest
from esper.workers.tolaria.data.shards import FILE, Manifest, SplitManifest, TokenData, kind_of, write_split

CHUNK_DOCUMENTS = 10_000  # encoded at a time, so that only so much is held as ids of 8 bytes
MIN_TOKENS = {"train": 1000, "valid": 100}
SPLITTING = 2  # version of the split into documents and held-out text, for the cache

Data = TokenData | ImageData  # any kind of prepared data


def prepare(data: DataSpec | ImageSpec, out: Path) -> Manifest | ImageManifest:
    """Write the new folder `out`: arrays and `manifest.json` (and a tokenizer), whole or not at all."""
    check_unused(out)
    if isinstance(data, ImageSpec):
        return _write_images(image_sources.available(image_sources.find(data.source)), data, out)
    tokenizer.checked_name(data.tokenizer)
    return _write(sources.available(sources.find(data.source)), data, out)


def ensure(data: DataSpec | ImageSpec) -> Path:
    """The source's folder, else one in the cache, made if needed; safe to call from several processes."""
    if isinstance(data, DataSpec):
        tokenizer.checked_name(data.tokenizer)
    folder = Path(data.source).expanduser()
    if (folder / FILE).exists():
        _check_made_as(data, folder)
        return folder
    return _ensure_images(data) if isinstance(data, ImageSpec) else _ensure_text(data)


def open_data(path: Path, *, verify: bool = True) -> Data:
    """Prepared data of any kind; UserError where it is damaged, of which `verify` makes sure."""
    return (ImageData if kind_of(path) == "images" else TokenData).open(path, verify=verify)


def _check_made_as(data: DataSpec | ImageSpec, folder: Path) -> None:
    """Raise UserError where the data in `folder` are not of the kind and form that is asked for."""
    if (kind := kind_of(folder)) != data.kind:
        what = f"{folder} holds prepared {kind}, and the preset is for {data.kind}"
        raise UserError(f"{what}: name other data, or another --task or --preset.")
    if isinstance(data, ImageSpec):
        if data.size not in (None, made_with := ImageManifest.read(folder).size):
            what = f"the images in {folder} were made {made_with} pixels wide, data.size={data.size} was asked for"
            raise UserError(f"{what}: ask for that, or make others with `esper prepare`.")
    elif (made_with := Manifest.read(folder).tokenizer) != data.tokenizer:
        what = f"the shards in {folder} were made with tokenizer {made_with!r}, {data.tokenizer!r} was asked for"
        raise UserError(f"{what}: ask for {made_with!r}, or make others with `esper prepare`.")


def _ensure_text(data: DataSpec) -> Path:
    def cached(source: sources.Source) -> Path:
        options = data.tokenizer, data.valid_fraction, data.max_bytes
        return _cached(source, data.tokenizer, shards.VERSION, SPLITTING, source.name, source.fingerprint, *options)

    source = sources.find(data.source)
    if not cached(source).exists():
        source = sources.available(source)  # perhaps the stand-in, which is cached under its own name
    folder = cached(source)
    if not folder.exists():
        _write(source, data, folder)
    return folder


def _ensure_images(data: ImageSpec) -> Path:
    source = image_sources.find(data.source)
    options = data.size, data.valid_fraction, data.max_images
    folder = _cached(source, "images", images.VERSION, source.name, source.fingerprint, *options)
    if not folder.exists():
        _write_images(image_sources.available(source), data, folder)
    return folder


def _cached(source: sources.Source, form: str, *key: object) -> Path:
    """The cache folder, whose name has a hash of all that decides its content, the `key`."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", f"{Path(source.name).stem}-{form}")
    return cache("data") / f"{stem}-{digest}"


def _write_images(source: sources.Source[image_sources.Splits], data: ImageSpec, out: Path) -> ImageManifest:
    started = time.perf_counter()
    train, held = image_sources.split(source, data.valid_fraction, data.max_images, data.size)
    with new_folder(out) as folder:
        made = ImageManifest(
            source=source.name,
            classes=int(max(train.labels.max(), held.labels.max())) + 1,
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


def _write(source: sources.Source[sources.Documents], data: DataSpec, out: Path) -> Manifest:
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
