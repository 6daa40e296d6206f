"""Documents from local files: .txt, .parquet, .jsonl, and folders of them."""

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from esper.platform.errors import UserError

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 2000


class Piece(str):
    """A part of a running text, one without document marks: it goes on in the next piece."""

    __slots__ = ()


def read_txt(path: Path) -> Iterator[str]:
    """The documents of a UTF-8 text file, which `<|endoftext|>` separates; without any, its pieces."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, for example with `iconv -t UTF-8`."
        ) from None
    if SEPARATOR in text:
        yield from (document.strip() for document in text.split(SEPARATOR))
    else:
        yield from pieces(text)


def pieces(text: str) -> Iterator[Piece]:
    """Pieces of 2,000 to 4,000 characters: to a blank line where one is in that range, else a line's end or a space."""
    start = 0
    while start < len(text):
        least, most = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        cuts = (text.find(boundary, least, most) for boundary in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut >= 0), most)
        yield Piece(text[start:end].strip())
        start = end


def read_parquet(path: Path) -> Iterator[str]:
    """The rows of column `text`, or of the only column of strings; nulls are left out."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
            column = _the_text(f"{path} has the columns", schema.names, strings)
            for batch in file.iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{path} is not a whole Parquet file ({reason}): fetch or write it anew.") from None


def read_jsonl(path: Path) -> Iterator[str]:
    """The texts of a UTF-8 file with one JSON object a line; blank lines and null texts are left out.

    The first object settles the key: `text`, or the only one whose value is a string (or null). A line may also be
    a JSON string, which is a text as it is. One line is held in memory at a time.
    """
    key = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            try:
                record = from_json(content) if content else None
            except ValueError as error:
                raise UserError(
                    f"{where} is not JSON in UTF-8 ({error}): give each text its own line, such as "
                    '{"text": "Once upon a time"}.'
                ) from None
            if isinstance(record, dict):
                strings = [name for name, value in record.items() if value is None or isinstance(value, str)]
                key = key or _the_text(f"{where} has the keys", record, strings)
                record = record.get(key, record)
            if isinstance(record, str):
                yield record
            elif record is not None:
                raise UserError(f"{where} is no object with a string under {key or 'text'!r}: mend or delete the line.")


def _the_text(what: str, names: Iterable[str], strings: list[str]) -> str:
    """Of the names that hold strings the one called `text`, or the only one."""
    if "text" in strings or len(strings) == 1:
        return "text" if "text" in strings else strings[0]
    raise UserError(
        f"{what} {', '.join(names) or '(none)'}, of which none is called 'text' and {len(strings)} hold strings: "
        "name the one with the text 'text'."
    )


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": read_txt,
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
}


def text_files(path: Path) -> list[Path]:
    """The readable files at `path`: itself, or those directly in the folder, by name.

    Raises:
        UserError: there is none.
    """
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".")
    readable = [file for file in found if file.suffix in READERS]
    if not readable:
        what = f"{path} holds no" if path.is_dir() else f"{path} is no"
        kinds = ".txt, .parquet or .jsonl file"
        raise UserError(f"{what} {kinds}: give a {kinds}, or a folder with such files directly in it.")
    return readable


def read(path: Path) -> tuple[Iterator[str], Iterator[str] | None]:
    """Training and validation documents of a file or folder.

    If a folder holds both files whose names start with `train` and files whose names start with `valid`, those are
    the splits and its other files are left out; otherwise all files are documents and validation is None.
    """
    files = text_files(path)
    train, valid = ([file for file in files if file.name.startswith(name)] for name in ("train", "valid"))
    return (_all(train), _all(valid)) if train and valid else (_all(files), None)


def _all(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield from READERS[file.suffix](file)


def fingerprint(path: Path) -> str:
    """What tells this text from another without reading it: paths, sizes and modification times of its files."""
    stats = [(file.resolve(), file.stat()) for file in text_files(path)]
    lines = "".join(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for file, stat in stats)
    return hashlib.sha256(lines.encode()).hexdigest()
