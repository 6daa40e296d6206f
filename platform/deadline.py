"""A call with a deadline: sockets' own timeouts cover neither hanging name resolution nor a slow drip."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call`'s result; raises TimeoutError after `seconds` and leaves the call to a daemon thread."""
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
