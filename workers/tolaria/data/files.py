"""Documents from .txt, .parquet and .jsonl files and folders of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from esper.platform.errors import UserError

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 2000
JSON_BLOCKS = pj.ReadOptions(block_size=64 * 2**20)  # bytes: a line must fit into one


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


def _txt(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8-sig")
    yield from map(str.strip, text.split(SEPARATOR)) if SEPARATOR in text else pieces(text)


def _parquet(path: Path) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[_text_column(file.schema_arrow)]):
            yield from batch.column(0).drop_null().to_pylist()


def _jsonl(path: Path) -> Iterator[str]:
    column = _text_column(pj.open_json(path, JSON_BLOCKS).schema)  # of the first block
    text_alone = pj.ParseOptions(pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore")
    for batch in pj.open_json(path, JSON_BLOCKS, text_alone):
        yield from batch.column(0).drop_null().to_pylist()


def _text_column(schema: pa.Schema) -> str:
    strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if "text" in strings or len(strings) == 1:
        return "text" if "text" in strings else strings[0]
    raise ValueError(f"of {', '.join(schema.names)} none is called 'text', and {len(strings)} hold strings")


READERS = {".txt": _txt, ".parquet": _parquet, ".jsonl": _jsonl}


def read_file(path: Path) -> Iterator[str]:
    """A file's documents without nulls; UserError where it is damaged or has no one column of texts."""
    try:
        yield from READERS[path.suffix](path)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), "")
        rule = "write it anew, in UTF-8 and with each text under 'text'"
        raise UserError(f"{path} is no whole {path.suffix} file ({reason}): {rule}.") from None


def read(path: Path) -> tuple[Iterator[str], Iterator[str] | None]:
    """Training and validation documents: `train*` and `valid*` of a folder with both, else (all files, None)."""
    files = text_files(path)
    train, valid = ([file for file in files if file.name.startswith(name)] for name in ("train", "valid"))
    return (_all(train), _all(valid)) if train and valid else (_all(files), None)


def _all(files: list[Path]) -> Iterator[str]:
    return (document for file in files for document in read_file(file))


def text_files(path: Path) -> list[Path]:
    """The readable file at `path`, or those directly in the folder, by name; UserError where there is none."""
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")
    if readable := [file for file in found if file.suffix in READERS]:
        return readable
    kinds = ".txt, .parquet or .jsonl file"
    what = f"{path} holds no" if path.is_dir() else f"{path} is no"
    raise UserError(f"{what} {kinds}: give a {kinds}, or a folder with such files directly in it.")


def fingerprint(path: Path) -> str:
    """A hash of the paths, sizes and modification times of the files."""
    stats = [(file.resolve(), file.stat()) for file in text_files(path)]
    lines = "".join(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for file, stat in stats)
    return hashlib.sha256(lines.encode()).hexdigest()
