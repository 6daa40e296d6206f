"""Documents from local files: .txt, .parquet, .jsonl, and folders of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esper.platform.errors import UserError

SEPARATOR = "<|endoftext|>"
PIECE_CHARACTERS = 2000


def read_txt(path: Path) -> Iterator[str]:
    """The documents of a UTF-8 text file, outer whitespace stripped.

    They are separated by `<|endoftext|>`. A file without that separator is cut into pieces of 2,000 to 4,000
    characters, each ending at a blank line where there is one in that range, else at a line's end, else at a space.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, for example with `iconv -t UTF-8`."
        ) from None
    yield from (piece.strip() for piece in (text.split(SEPARATOR) if SEPARATOR in text else _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        least, most = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        cuts = (text.find(boundary, least, most) for boundary in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut >= 0), most)
        yield text[start:end]
        start = end


def read_parquet(path: Path) -> Iterator[str]:
    """The rows of column `text`, or of the only column of strings; nulls are left out."""
    try:
        with pq.ParquetFile(path) as file:
            column = _text_column(path, file.schema_arrow)
            for batch in file.iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole Parquet file ({error}): fetch or write it anew.") from None


def _text_column(path: Path, schema: pa.Schema) -> str:
    strings = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    return _the_text(f"{path} has the columns", schema.names, strings, "strings")


def read_jsonl(path: Path) -> Iterator[str]:
    """The texts of a UTF-8 file with one JSON object a line; blank lines and null texts are left out.

    The first object settles the key: `text`, or the only one whose value is a string (or null). A line may also be
    a JSON string, which is a text as it is. One line is held in memory at a time.
    """
    key = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {path}"
            record = _json(where, line)
            if isinstance(record, dict):
                key = key or _text_key(where, record)
                record = record.get(key, record)
            if isinstance(record, str):
                yield _encodable(where, record)
            elif record is not None:
                raise UserError(f"{where} is no object with a string under {key or 'text'!r}: mend or delete the line.")


def _json(where: str, line: bytes) -> Any:
    """The value of a line, None if it is blank."""
    try:
        text = line.decode("utf-8-sig").strip()
        return json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (its byte {error.start}): convert the file, for example with `iconv -t UTF-8`."
        ) from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(
            f'{where} is not JSON ({reason}): give each text its own line, such as {{"text": "Once upon a time"}}.'
        ) from None


def _encodable(where: str, text: str) -> str:
    """`text`, which JSON's escapes can give what UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character ({text[error.start]!r}): mend or delete the line.") from None
    return text


def _text_key(where: str, record: dict[str, Any]) -> str:
    strings = [key for key, value in record.items() if value is None or isinstance(value, str)]
    return _the_text(f"{where} has the keys", record, strings, "a string")


def _the_text(what: str, names: Iterable[str], strings: list[str], wanted: str) -> str:
    """Of `names`, those in `strings` hold strings: the one called `text`, or the only one."""
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"{what} {', '.join(names) or '(none)'}, of which none is {wanted} called 'text' and "
        f"{len(strings)} hold strings: name the one with the text 'text'."
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
        *others, last = READERS
        kinds = f"{', '.join(others)} or {last}"
        what = f"{path} holds no {kinds} file" if path.is_dir() else f"{path} is no {kinds} file"
        raise UserError(f"{what}: give a {kinds} file, or a folder with such files directly in it.")
    return readable


def read(path: Path) -> tuple[Iterator[str], Iterator[str] | None]:
    """Training and validation documents of a file or folder.

    If a folder holds both files whose names start with `train` and files whose names start with `valid`, those are
    the splits and its other files are left out; otherwise all files are documents and validation is None.
    """
    files = text_files(path)
    train = [file for file in files if file.name.startswith("train")]
    valid = [file for file in files if file.name.startswith("valid")]
    return (_all(train), _all(valid)) if train and valid else (_all(files), None)


def _all(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield from READERS[file.suffix](file)


def fingerprint(path: Path) -> str:
    """What tells this text from another without reading it: paths, sizes and modification times of its files."""
    digest = hashlib.sha256()
    for file in text_files(path):
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
