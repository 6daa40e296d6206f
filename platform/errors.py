"""Errors that a user can mend: one sentence saying what was wrong, what is allowed and how to mend it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Bad input. Pipelines print the sentence and exit with code 2, without a traceback."""


def unknown(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a `name` not among the `known`, with the closest one suggested."""
    names = sorted(known)
    close = get_close_matches(str(name)[:100], names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"unknown {what} {clipped(name)}: it must be one of {', '.join(names)}.{hint}")


def like_a_path(name: str) -> bool:
    """Whether a name has a separator or a suffix, as one of a file would."""
    return bool(re.search(r"[/\\]", name) or Path(name).suffix)


@contextmanager
def in_a_sentence(wrong: str, mend: str) -> Iterator[None]:
    """Turn whatever an odd file leads to inside a `with` block into a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a reader of bytes raises what it likes
        raise UserError(f"{wrong} ({type(error).__name__}: {reason(error)}): {mend}.") from None


def clipped(value: object) -> str:
    """A value's repr, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def shown(address: str) -> str:
    """An address without the password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", address)


def reason(error: Exception) -> str:
    """What went wrong, in a line without passwords."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    bottom = re.search(r"\[Errno -?\d+\] ([\w ]+)", text)  # of requests' long tale
    return shown(bottom[1] if bottom else text.splitlines()[0])[:200].rstrip(".: ")
