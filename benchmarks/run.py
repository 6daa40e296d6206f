"""`make bench` (or `python benchmarks/run.py step growth dispatch`): paired ratios, and the dispatcher's speed."""

import copy
import heapq
import platform as host_platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from plain_gpt import PlainGPT, PlainTrainer

from esper.platform.contracts import GraftAction, Instance, Order, Reply
from esper.platform.spec import DataSpec, load_spec
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import Events, LocalFleet
from esper.policies.simic.net import ControllerNet
from esper.workers.candidates import telemetry_space
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.laws.surrogate import SurrogateRun
from esper.workers.tolaria.data import TokenData, ensure
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import Trainer

LARGE = ["data.batch_size=2", "data.tokenizer=char", "dtype=float32", "device=cpu"]
SHAPES = {  # name → steps of a block, spec
    "demo": (60, load_spec("demo")),
    "tinystories-char, 1 layer": (60, load_spec("tinystories-char", ["host.n_layer=1"])),
    "tinystories-char, 4 layers": (30, load_spec("tinystories-char", ["host.n_layer=4"])),
    "tinystories (batch 2)": (5, load_spec("tinystories", LARGE)),
}
GRAFTS = (("h0.ffn", "ffn"), ("h0.attention", "attention"), ("h0.stream", "block"))
BURN_IN = 3
BLOCKS = 7  # paired blocks, each a few steps of the one, then of the other
RATE = 1e-4


def paired(a: Callable[[], object], b: Callable[[], object], steps: int) -> str:
    """Seconds of b over seconds of a, above 1 where a is faster: median and range over paired blocks.

    The range of 7 blocks covers the true median with 98 % (sign test, 1 − 2·½⁷).
    """
    for _ in range(BURN_IN):
        a()
        b()
    ratios = []
    for block in range(BLOCKS):
        taken = {}
        for work in (a, b) if block % 2 else (b, a):
            begun = time.perf_counter()
            for _ in range(steps):
                work()
            taken[work] = time.perf_counter() - begun
        ratios.append(taken[b] / taken[a])
    return f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f}, {BLOCKS} paired blocks)"


def bench_step(data: TokenData) -> None:
    """A training step of a growable host, never grown, against a plain GPT of the same shape."""
    print("training step, speed of ours over a plain GPT of the same shape (goal: 0.98x or more)")
    tokens = data.windows("train", np.array([0]), min(data.tokens("train"), 500_000))[0]
    for name, (steps, spec) in SHAPES.items():
        ours, host = Trainer(spec, data, make_blueprints(), 0, Instance()), spec.host
        model = PlainGPT(data.manifest.vocab_size, host.block_size, host.n_layer, host.n_head, host.n_embd)
        plain = PlainTrainer(model, tokens, spec.data.batch_size)
        print(f"  {name:<28} {paired(lambda ours=ours: ours.step(RATE), plain.step, steps)}")


def bench_growth(data: TokenData) -> None:
    """A step of a host grown by a seed of each kind, on probation and fused, against one born that shape."""
    print("training step, speed of a grown host over one born that shape (goals: fused 0.98x, on probation 0.93x)")
    for name, (steps, spec) in list(SHAPES.items())[:3]:
        blueprints = make_blueprints(spec.growth.blueprints)
        young, born = (Trainer(spec, data, blueprints, 0, Instance()) for _ in range(2))
        for site, blueprint in GRAFTS:
            young.kasmina.graft(site, blueprint)
        fused = copy.deepcopy(young)
        for seed in list(fused.kasmina.seeds):
            fused.kasmina.fuse(seed)
        for seed in young.kasmina.seeds:  # for as long as the benchmark takes
            seed.probation = seed.fuse_age = 10**9
        shape = young.host.shape
        host = spec.host.model_copy(update={"n_layer": shape.depth(), "layers": shape.layers})
        born.take(TransformerHost(host, shape.vocab_size))
        for stage, grown in (("fused", fused), ("on probation", young)):
            ratio = paired(lambda grown=grown: grown.step(RATE), lambda born=born: born.step(RATE), steps)
            print(f"  {name:<28} {stage:<13} {ratio}")
            grown.forget()
            born.forget()


class TimedFleet(LocalFleet):
    """Workers that take `seconds` on average and answer from a recorded episode, without Ray or training."""

    lockstep = False

    def __init__(self, count: int, seconds: float, recorded: list[Any]) -> None:
        super().__init__(lambda: None, 0)  # pyright: ignore  (it makes none)
        self._seconds, self._recorded, self._chance = seconds, recorded, np.random.default_rng(0)
        self._due: list[tuple[float, int, Order | None]] = [(0.0, worker, None) for worker in range(count)]
        self._answered: dict[int, float] = {}
        self.latencies: list[float] = []  # seconds from an answer to the next order

    def submit(self, worker: int, order: Order) -> None:
        """Answer after a while."""
        now = time.perf_counter()
        if worker in self._answered:
            self.latencies.append(now - self._answered[worker])
        spread = (0.5, 1.5) if order.actions else (0.0, 4.0)  # so that they are not all at one point
        heapq.heappush(self._due, (now + self._seconds * self._chance.uniform(*spread), worker, order))

    def ready(self, timeout: float) -> Events:
        """The answers that are due."""
        if self._due:
            time.sleep(max(0.0, min(timeout, self._due[0][0] - time.perf_counter())))
        events: Events = []
        while self._due and self._due[0][0] <= time.perf_counter():
            due, worker, order = heapq.heappop(self._due)
            self._answered[worker] = due
            answer = order and Reply(order.episode, self._recorded[len(order.actions)], expected=self._seconds)
            events.append((worker, answer))  # none: that it has started
        return events


def bench_dispatch(data: TokenData) -> None:
    """Decisions a second through one dispatcher, and latency, by number of workers; Ray's own share is not in it."""
    print("dispatcher, one core, with its journal (goals: 500 decisions/s and p99 < 100 ms at 1,000 workers)")
    spec = load_spec("tinystories-char")
    run, space, decisions = SurrogateRun(spec), telemetry_space(spec), spec.budget.decisions
    recorded: list[Any] = [run.reset(Instance(), 0)]
    while not run.ended:
        k, legal = run.telemetry.sequence, run.telemetry.legal()
        recorded.append(run.step(GraftAction(int(legal[-1]) if k % 7 == 3 else 0, k)))
    for count, seconds in ((1, 0.02), (10, 0.1), (100, 0.4), (1000, 1.9), (1000, 0.5)):
        with tempfile.TemporaryDirectory() as folder:
            fleet, net = TimedFleet(count, seconds, recorded), ControllerNet(spec.ppo.hidden)
            dispatcher = Dispatcher(fleet, net, space, seed=0, ahead=10**9, journal=Path(folder))
            try:
                dispatcher.collect(decisions * min(count, 5))
                fleet.latencies.clear()
                begun = time.perf_counter()
                while (spent := time.perf_counter() - begun) < 15:
                    dispatcher.collect(decisions)
                    dispatcher.forget()
                median, p99 = 1e3 * np.quantile(fleet.latencies, [0.5, 0.99])
                rate = len(fleet.latencies) / spent
            finally:
                dispatcher.stop()
        offered = f"{count:>5} workers, {count / seconds:>5.0f}/s offered"
        print(f"  {offered}: {rate:>5.0f} decisions/s, latency median {median:.1f} ms, p99 {p99:.1f} ms")


BENCHMARKS = {"step": bench_step, "growth": bench_growth, "dispatch": bench_dispatch}


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    print(f"{host_platform.processor() or host_platform.machine()}, torch {torch.__version__}, 1 thread")
    torch.set_num_threads(1)
    data = TokenData.open(ensure(DataSpec(source="python-docs")))
    for name in names or BENCHMARKS:
        BENCHMARKS[name](data)


if __name__ == "__main__":
    main(sys.argv[1:])
