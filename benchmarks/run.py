"""`make bench` (or `python benchmarks/run.py step growth dispatch sweep`): paired ratios, timed in turn."""

import copy
import platform as host_platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fleet import bench_dispatch
from plain_gpt import PlainGPT, PlainTrainer
from trials import bench_sweep

from esper.platform.contracts import Instance
from esper.platform.spec import DataSpec, RunSpec, load_spec
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.data import TokenData, ensure, prepare
from esper.workers.tolaria.model.transformer import TransformerHost
from esper.workers.tolaria.trainer import Trainer

SHAPES = {
    "demo": (60, load_spec("demo")),
    "tinystories-char, 1 layer": (60, load_spec("tinystories-char", ["host.n_layer=1"])),
    "tinystories-char, 4 layers": (30, load_spec("tinystories-char", ["host.n_layer=4"])),
    "tinystories (batch 2)": (5, load_spec("tinystories", ["data.batch_size=2", "dtype=float32", "device=cpu"])),
}
BURN_IN = 3
BLOCKS = 7  # paired blocks, each a few steps of the one, then of the other


def paired(a: Callable[[], object], b: Callable[[], object], steps: int) -> list[float]:
    """Seconds of b over seconds of a, one value per block; above 1 a is faster."""
    for _ in range(BURN_IN):
        a()
        b()
    ratios = []
    for block in range(BLOCKS):
        taken = {}
        for name, work in (("a", a), ("b", b)) if block % 2 else (("b", b), ("a", a)):
            begun = time.perf_counter()
            for _ in range(steps):
                work()
            taken[name] = time.perf_counter() - begun
        ratios.append(taken["b"] / taken["a"])
    return ratios


def shown(ratios: list[float]) -> str:
    """Median and range; the range of 7 blocks covers the true median with 98 % (sign test, 1 − 2·½⁷)."""
    return f"{statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} paired blocks)"


def bench_step() -> None:
    """A training step of a growable host, never grown, against a plain GPT of the same shape."""
    print("training step, speed of ours over a plain GPT of the same shape (goal: 0.98x or more)")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = ensure(DataSpec(source="python-docs"))
        for name, (steps, spec) in SHAPES.items():
            data = _data(spec, source, Path(folder))
            vocabulary = data.manifest.vocab_size
            ours = Trainer(spec, data, make_blueprints(), 0, Instance())
            h = spec.host
            tokens = data.windows("train", np.array([0]), min(data.tokens("train"), 500_000))[0]
            model = PlainGPT(vocabulary, h.block_size, h.n_layer, h.n_head, h.n_embd)
            plain = PlainTrainer(model, tokens, spec.data.batch_size)
            ratios = paired(lambda ours=ours: ours.step(1e-4), plain.step, steps)
            ours.forget()
            print(f"  {name:<28} {shown(ratios)}")


GRAFTS = (("h0.ffn", "ffn"), ("h0.attention", "attention"), ("h0.stream", "block"))


def bench_growth() -> None:
    """A step of a host grown by a seed of each kind, on probation and fused, against one born that shape."""
    print("training step, speed of a grown host over one born that shape (goals: fused 0.98x, on probation 0.93x)")
    torch.set_num_threads(1)
    data = TokenData.open(ensure(DataSpec(source="python-docs")))
    for name, (steps, spec) in list(SHAPES.items())[:3]:
        blueprints = make_blueprints(spec.growth.blueprints)
        young = Trainer(spec, data, blueprints, 0, Instance())
        for site, blueprint in GRAFTS:
            young.kasmina.graft(site, blueprint)
        fused = copy.deepcopy(young)
        for seed in list(fused.kasmina.seeds):
            fused.kasmina.fuse(seed)
        for seed in young.kasmina.seeds:  # for as long as the benchmark takes
            seed.probation = seed.fuse_age = 10**9
        born = Trainer(spec, data, blueprints, 0, Instance())
        shape = young.host.shape
        spec_born = spec.host.model_copy(update={"n_layer": shape.depth(), "layers": shape.layers})
        born.take(TransformerHost(spec_born, shape.vocab_size))
        for stage, grown in (("fused", fused), ("on probation", young)):
            ratios = paired(lambda grown=grown: grown.step(1e-4), lambda born=born: born.step(1e-4), steps)
            grown.forget()
            born.forget()
            print(f"  {name:<28} {stage:<13} {shown(ratios)}")


def _data(spec: RunSpec, source: Path, folder: Path) -> TokenData:
    if spec.data.tokenizer == "char":
        return TokenData.open(source)
    out = folder / spec.data.tokenizer.replace(":", "-")
    if not out.exists():
        tokenizer = spec.data.tokenizer if spec.data.tokenizer != "gpt2" else "bpe:4096"
        prepare(DataSpec(source="python-docs", tokenizer=tokenizer), out)
    return TokenData.open(out)


BENCHMARKS = {
    "step": bench_step,
    "growth": bench_growth,
    "dispatch": bench_dispatch,
    "sweep": bench_sweep,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    print(f"{host_platform.processor() or host_platform.machine()}, torch {torch.__version__}, 1 thread")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
