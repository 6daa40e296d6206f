"""The network, asked in seconds: is a server there, and what does the hub's data set hold?

The libraries below retry for up to minutes when nothing answers, so they are called only after a probe.
"""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar

from esper.platform.errors import UserError

PROBE_SECONDS = 4.0

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, run in a thread that is left behind (a daemon) when it takes longer.

    Timeouts of sockets do not cover name resolution, which can hang just as long.

    Raises:
        TimeoutError: no result after `seconds`. Whatever `call` raises is raised here too.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def answers(url: str) -> bool:
    """Whether a working server answers at `url` within `PROBE_SECONDS`; proxies in the environment are honoured."""

    def ask() -> bool:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):  # the headers; the body is not read
            return True

    try:
        return within(PROBE_SECONDS, ask)
    except urllib.error.HTTPError as error:
        with error:  # which holds the connection
            return error.code < 500  # a refusal is an answer: the library's own error says more about it
    except (OSError, ValueError):  # unknown host, refused, TLS, timeout; a malformed HF_ENDPOINT
        return False


def hub_answers(repo: str) -> bool:
    """Whether the Hugging Face hub (or `$HF_ENDPOINT`) serves the data set `repo`; at once false when set offline."""
    if any(
        os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return answers(f"{endpoint}/datasets/{repo}/resolve/main/README.md")


def hub_texts(repo: str, split: str) -> Iterator[str]:
    """Stream the column `text` of one split; nothing is stored, and only what is consumed is downloaded.

    Args:
        repo: a data set of the hub, or a local folder in the hub's layout (`data/train-*.parquet`, …).
        split: `train` or `validation`.

    Raises:
        UserError: the hub stopped answering, or the data set is not as expected.
    """
    import datasets  # a second to import, and needed by this source alone
    import huggingface_hub

    # Their warnings are of retries: the one sentence of our error says what matters.
    datasets.logging.set_verbosity_error()
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
