"""The network, asked in seconds: the libraries retry for up to minutes when nothing answers, so we probe first."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from esper.platform.errors import UserError

PROBE_SECONDS = 4.0

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, run in a daemon thread: sockets' timeouts do not cover a name resolution that hangs.

    Raises:
        TimeoutError: no result after `seconds`. Whatever `call` raises is raised here too.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def hub_answers(repo: str) -> bool:
    """Whether the Hugging Face hub (or `$HF_ENDPOINT`) knows the data set `repo`; at once false when set offline."""
    import huggingface_hub  # half a second to import

    hub = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        within(PROBE_SECONDS, lambda: hub.dataset_info(repo, timeout=PROBE_SECONDS))
    except Exception:  # offline, an unknown host, refused, TLS, a timeout, a malformed endpoint: of several libraries
        return False
    return True


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
