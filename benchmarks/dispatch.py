"""What a dispatcher gives its users: how soon a worker has its next order, and what serving it costs one core.

Workers are simulated: their replies are those of a recorded episode. Ray's own share of a decision is not in it.
"""

import heapq
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Row

from esper.platform.contracts import GraftAction, Instance, Order, Reply
from esper.platform.spec import RunSpec, load_spec
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import Events, LocalFleet
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.ppo import PPOTraining
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.observe import telemetry_space

SPEC = "tinystories-char"
WORKERS = 1000
OFFERED = 500  # decisions a second
SECONDS = 20  # of each measurement
BATCH = 256  # decisions that are collected at a time


class Recorded:
    """A worker that answers at once, without Ray or training."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers, self.decisions = answers, 0

    def advance(self, order: Order) -> Reply:
        self.decisions += bool(order.actions)
        return Reply(order.episode, self._answers[len(order.actions)], expected=1.0)


class Offered(LocalFleet):
    """Workers that work an exponential time at each decision (a Poisson process), and begin at evenly spread places."""

    lockstep = False

    def __init__(self, answers: list[Any], workers: int, rate: float) -> None:
        super().__init__(lambda: Recorded(answers), workers)
        self._answers, self._work, self._random = answers, workers / rate, np.random.default_rng(0)
        self.at_once = [worker % len(answers) for worker in range(workers)]  # orders still to be answered so
        self._due: list[tuple[float, int, Order]] = []  # a heap: when a reply arrives
        self._came: dict[int, float] = {}  # worker → when its last reply was to arrive
        self._woken = threading.Event()
        self.replies = 0  # that have arrived
        self.latencies: list[float] = []  # seconds from a reply's arrival to the next order
        self.decisions, self.spent = 0, 0.0  # that were sent; the serving thread's seconds of CPU

    def submit(self, worker: int, order: Order) -> None:
        """Take an order, and note how long the worker waited for it."""
        now = time.perf_counter()
        self.decisions += bool(order.actions)
        if worker in self._came:
            self.latencies.append(now - self._came.pop(worker))
        work = 0.0 if self.at_once[worker] else self._random.exponential(self._work)
        self.at_once[worker] = max(0, self.at_once[worker] - 1)
        heapq.heappush(self._due, (now + work, worker, order))

    def ready(self, timeout: float) -> Events:
        self.spent = time.thread_time()
        events, self._events = self._events, []
        if events:
            return events
        self._woken.wait(max(0.0, min([timeout, *(due - time.perf_counter() for due, *_ in self._due[:1])])))
        self._woken.clear()
        while self._due and self._due[0][0] <= time.perf_counter():
            due, worker, order = heapq.heappop(self._due)
            self._came[worker], self.replies = due, self.replies + 1
            events.append((worker, Reply(order.episode, self._answers[len(order.actions)], expected=1.0)))
        return events

    def wake(self) -> None:
        self._woken.set()


def recorded(spec: RunSpec) -> list[Any]:
    """The answers of an episode on a scaling law: the first observation, then one a decision."""
    run = SurrogateRun(spec)
    answers: list[Any] = [run.reset(Instance(), 0)]
    while not run.ended:
        k, legal = run.telemetry.sequence, run.telemetry.legal()
        answers.append(run.step(GraftAction(int(legal[-1]) if k % 7 == 3 else 0, k)))
    return answers


def saturated(spec: RunSpec, answers: list[Any], workers: int) -> float:
    """Decisions a second that one core serves when every worker answers at once."""
    with tempfile.TemporaryDirectory() as folder:
        worker, net = Recorded(answers), ControllerNet(spec.ppo.hidden)
        fleet = LocalFleet(lambda: worker, workers)
        dispatcher = Dispatcher(fleet, net, telemetry_space(spec), seed=0, ahead=10**9, journal=Path(folder))
        try:
            begun = time.perf_counter()
            while (taken := time.perf_counter() - begun) < SECONDS:
                dispatcher.collect(BATCH)
                dispatcher.forget()
        finally:
            dispatcher.stop()
    return worker.decisions / taken


def learn(training: PPOTraining, ended: threading.Event) -> None:
    """PPO updates without a pause."""
    while not ended.is_set():
        training.iterate()


def measured(fleet: Offered, dispatcher: Dispatcher, what: str) -> list[Row]:
    """Rows of `SECONDS` in which the replies arrive and whole episodes are collected; the seconds before warm up."""
    for seconds in (3, SECONDS):
        fleet.latencies, fleet.replies, decisions, spent = [], 0, fleet.decisions, fleet.spent
        begun = time.perf_counter()
        while (taken := time.perf_counter() - begun) < seconds:
            dispatcher.collect(BATCH)
            dispatcher.forget()
    decisions, spent = fleet.decisions - decisions, fleet.spent - spent
    answered, rate = len(fleet.latencies) / fleet.replies, decisions / taken
    middle, late = (1000 * np.quantile(fleet.latencies, each) for each in (0.5, 0.99))
    what = f"{OFFERED} decisions/s offered by {WORKERS} workers{what}: served"
    return [
        (what, "99 %", f"{answered:.1%} of {rate:.0f}/s"),
        ("… from reply to order, p99", "< 100 ms", f"{late:.0f} ms (p50 {middle:.1f} ms)"),
        ("… CPU of the serving thread, a decision", "≤ 1.2 ms", f"{1000 * spent / decisions:.2f} ms"),
    ]


def offered(spec: RunSpec, answers: list[Any]) -> list[Row]:
    """Rows of what workers feel, without and with PPO's updates in another thread."""
    with tempfile.TemporaryDirectory() as folder:
        fleet = Offered(answers, WORKERS, OFFERED * len(answers) / (len(answers) - 1))  # the last asks for no decision
        training = PPOTraining(spec, telemetry_space(spec), lambda: LocalFleet(lambda: Recorded(answers), 16), seed=0)
        ended, net = threading.Event(), ControllerNet(spec.ppo.hidden)
        learner = threading.Thread(target=learn, args=[training, ended], daemon=True)
        dispatcher = Dispatcher(fleet, net, telemetry_space(spec), seed=0, ahead=10**9, journal=Path(folder))
        try:
            while any(fleet.at_once):
                dispatcher.collect(0)
                time.sleep(0.1)
            rows = measured(fleet, dispatcher, "")
            learner.start()
            rows += measured(fleet, dispatcher, ", while PPO learns")
            ended.set()
            learner.join()
            training.stop()
        finally:
            dispatcher.stop()
    return rows


def dispatch() -> list[Row]:
    """Rows: one core's capacity, and what 1,000 workers feel at 500 decisions a second."""
    spec = load_spec(SPEC)
    answers = recorded(spec)
    counts, what = (1, 10, 100, WORKERS), "{} workers that answer at once"
    capacity = [(what.format(count), "", f"{saturated(spec, answers, count):.0f} decisions/s") for count in counts]
    return capacity + offered(spec, answers)
