"""Benchmark of the dispatcher: logical workers, many to an async actor, sleep and answer with recorded telemetry."""

import asyncio
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import cloudpickle

from esper.platform.contracts import GraftAction, Instance, Order, Reply
from esper.platform.spec import load_spec
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import RayFleet
from esper.policies.simic.net import ControllerNet
from esper.workers.candidates import telemetry_space
from esper.workers.laws.surrogate import SurrogateRun

SPEC = load_spec("tinystories-char")


@ray.remote(num_cpus=0.01, max_restarts=0)
class Many:
    """Many logical workers in one process: each sleeps, then answers from a recorded episode."""

    def __init__(self, recorded: list[Any], seconds: float) -> None:
        self._recorded, self._seconds = recorded, seconds
        self._chance = np.random.default_rng(os.getpid())

    async def up(self) -> None:
        """Return once it is there."""

    async def advance(self, order: Order) -> Reply:
        """The recorded answer, after a while."""
        spread = (0.5, 1.5) if order.actions else (0.0, 4.0)  # so that they are not all at one point
        await asyncio.sleep(self._seconds * self._chance.uniform(*spread))
        return Reply(order.episode, self._recorded[len(order.actions)], expected=self._seconds, worked=self._seconds)


class LogicalFleet(RayFleet):
    """Logical workers, `each` to an actor; notes the times of replies and orders."""

    def __init__(self, count: int, each: int, seconds: float) -> None:
        actors = [Many.options(max_concurrency=2 * each).remote(_recorded(), seconds) for _ in range(-(-count // each))]
        ray.get([actor.up.remote() for actor in actors])
        self._shared = actors
        self.arrived: dict[int, float] = {}
        self.latencies: list[float] = []
        handles = iter([actors[i % len(actors)] for i in range(count)])
        super().__init__(lambda: next(handles), lambda: count)

    def submit(self, worker: int, order: Order) -> None:
        """Send, and note how long the previous reply waited."""
        super().submit(worker, order)
        if worker in self.arrived:
            self.latencies.append(time.perf_counter() - self.arrived[worker])

    def close(self) -> None:
        """End the actors."""
        self._actors.clear()
        for actor in self._shared:
            ray.kill(actor)  # pyright: ignore[reportArgumentType]  (its types know handles only)

    def _call(self, worker: int, reference: ray.ObjectRef) -> None:
        def came(future: Any) -> None:
            self.arrived[worker] = time.perf_counter()
            self._events.put((worker, future))

        reference.future().add_done_callback(came)


def _recorded() -> list[Any]:
    run = SurrogateRun(SPEC)
    answers: list[Any] = [run.reset(Instance(), 0)]
    while not run.ended:
        k = run.telemetry.sequence
        answers.append(run.step(GraftAction(int(run.telemetry.legal()[-1]) if k % 7 == 3 else 0, k)))
    return answers


def bench_dispatch() -> None:
    """Decisions a second through one dispatcher, latency, and cost a decision, by number of workers."""
    print("dispatcher, one core, with its journal (goals: 500 decisions/s and p99 < 100 ms at 1,000 logical workers)")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers could not import it
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        for count, seconds in ((1, 0.02), (10, 0.1), (100, 0.4), (1000, 1.9), (1000, 0.5)):
            _dispatch(count, seconds)
    finally:
        ray.shutdown()


def _dispatch(count: int, seconds: float, measure_for: float = 15.0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fleet = LogicalFleet(count, 250, seconds)
        journal = Path(folder) / "episodes"
        dispatcher = Dispatcher(
            fleet, ControllerNet(SPEC.ppo.hidden), telemetry_space(SPEC), seed=0, ahead=10**9, journal=journal
        )
        try:
            dispatcher.collect(SPEC.budget.decisions * min(count, 5))
            time.sleep(5 * seconds)
            fleet.latencies.clear()
            begun, cpu = time.perf_counter(), time.process_time()
            while time.perf_counter() - begun < measure_for:
                dispatcher.collect(SPEC.budget.decisions)
                dispatcher.forget()
            spent, cpu = time.perf_counter() - begun, time.process_time() - cpu
            latencies = sorted(fleet.latencies)
        finally:
            dispatcher.stop()
    n = len(latencies)
    print(
        f"  {count:>5} workers, {count / seconds:>5.0f}/s offered: {n / spent:>5.0f} decisions/s, latency median "
        f"{1e3 * statistics.median(latencies):.1f} ms, p99 {1e3 * latencies[int(0.99 * n)]:.1f} ms, "
        f"{1e3 * cpu / n:.2f} ms of the driver's cores a decision"
    )
