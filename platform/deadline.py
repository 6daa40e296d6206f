"""A call that may not take longer than so many seconds."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; where it takes longer, it is left alone in a thread that ends with the process.

    Raises:
        TimeoutError: it does take longer: sockets' own timeouts cover no name resolution that hangs, and no drip.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="call with a deadline", daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    return outcome.result()
