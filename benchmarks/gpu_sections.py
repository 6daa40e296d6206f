"""The sections of `gpu.py`: `python benchmarks/gpu_sections.py NAME DEVICE FILE` writes rows; a failed check raises."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from measuring import BURN_IN, RATE, Row, bound, in_turns, text, times, trainer
from step import grown_rows, plain_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.pipelines.common.play import play
from esper.pipelines.reports.verdict import moved_by
from esper.platform.errors import UserError
from esper.platform.spec import RunSpec, load_spec
from esper.policies.schedule import Entry, SchedulePolicy
from esper.workers.calibrate import calibrate as fit_clock
from esper.workers.observe import batch_tokens
from esper.workers.run import GrowthRun
from esper.workers.tolaria.trainer import pick_device

ROOT = Path(__file__).resolve().parents[1]
REHEARSED = (
    *("host.n_layer=2", "host.n_embd=32", "host.block_size=32", "growth.max_layers=4", "data.tokenizer=bpe:512"),
    *("data.batch_size=4", "data.eval_tokens=1024", 'growth.blueprints={"attention":{},"ffn":{"width":32},"block":{}}'),
)
# Dense bf16 TFLOP/s by a part of the device's name, as NVIDIA's data sheets have them (half of "with sparsity").
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
STEPS = {"cuda": 20, "cpu": 2}  # timed in a block
WORKERS = {"cuda": (1, 4, 8), "cpu": (1, 2)}  # packed
DEMO_REHEARSED = ("budget.amount=3000", "ppo.iterations=1", "ppo.decisions=8", "ppo.minibatch=8", "fleet.workers=1")


def spec_of(device: str, *overrides: str) -> RunSpec:
    """The `tinystories` preset on this device, on a text that is there without a network."""
    small = REHEARSED if device == "cpu" else ()
    spec = load_spec("tinystories", ["data.source=python-docs", f"device={device}", *small, *overrides])
    pick_device(spec)  # or fail at once
    return spec


def tests(device: str) -> Iterator[Row]:
    """The tests marked `gpu`; without one they are skipped."""
    files = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text("utf-8")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", *files], cwd=ROOT, capture_output=True)
    print(done.stdout.decode(), done.stderr.decode())
    yield "pytest -m gpu", "all pass", (done.stdout.decode().splitlines() or ["nothing"])[-1].strip("= ")
    assert done.returncode == 0, "a test failed: see tests.log"


def first_steps(spec: RunSpec, kernel: SDPBackend) -> tuple[torch.Tensor, torch.Tensor]:
    """The first step's gradient, flat, and the losses of 20 steps on the same batches from the same weights."""
    run = trainer(spec, text(spec))
    with sdpa_kernel(kernel):
        run.step(1e-3)
        gradient = torch.cat([p.grad.flatten().float() for p in run.host.parameters() if p.grad is not None])
        for _ in range(19):
            run.step(1e-3)
    return gradient, torch.tensor(run.measured())[:, 0]


def numerics(device: str) -> Iterator[Row]:
    """Each way to compute against float32 with the kernel that is written out."""
    exact, losses = first_steps(spec_of(device, "dtype=float32"), SDPBackend.MATH)
    ways = (
        ("bfloat16", SDPBackend.MATH, ()),
        ("bfloat16, SDPA's flash kernel", SDPBackend.FLASH_ATTENTION, ()),
        ("bfloat16, flash-attn", SDPBackend.MATH, ("host.attention=flash",)),
    )
    apart = []
    for name, kernel, overrides in ways:
        try:
            found, followed = first_steps(spec_of(device, *overrides), kernel)
        except UserError as error:
            yield name, "", f"not here: {error}"
            continue
        gradient, loss = float((found - exact).norm() / exact.norm()), float((followed - losses).abs().max())
        apart.append(not (gradient <= 0.05 and loss <= 0.05))
        yield (
            f"{name}: first gradient off by, losses of 20 steps off by",
            "≤ 5 %, ≤ 0.05",
            f"{gradient:.2%}, {loss:.4f}",
        )
    assert not any(apart), "a way to compute is too far from float32"


def utilisation(flops: float) -> str:
    """FLOP/s as a share of what this GPU's tensor cores could do in bf16, where `PEAKS` knows it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    peak = next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)
    return f"MFU {flops / peak:.1%}" if peak else f"MFU unknown on {name}"


def step(device: str, compiled: bool = False) -> Iterator[Row]:
    """Our training step and nanoGPT's, taking turns; `compiled` too, apart, as a bare machine may lack a compiler."""
    spec = spec_of(device, *(["dtype=float32"] if compiled and device == "cpu" else []))
    data = text(spec)
    ours, plain = trainer(spec, data), plain_gpt(spec, data, device)
    works: dict[str, Callable[[], object]] = {"ours": lambda: ours.step(RATE), "nanoGPT": plain.step}
    if compiled:
        fast, plain_fast = bound(trainer(spec, data)), plain_gpt(spec, data, device)
        how = {"dynamic": False, "backend": "inductor" if device == "cuda" else "aot_eager"}  # rehearsed in seconds
        plain_fast.model.compile(**how)
        works |= {"ours, compiled": lambda: fast.step(RATE), "nanoGPT, compiled": plain_fast.step}
    flops, tokens = ours.host.shape.flops_per_token(), batch_tokens(spec)
    seconds = in_turns(works, STEPS[device])
    for name, blocks in seconds.items():
        rate = tokens / statistics.median(blocks)
        told = f"{rate:,.0f} tokens/s, {1e3 * tokens / rate:.2f} ms, {utilisation(rate * flops)}"
        yield f"training step: {name}", "", told
    if compiled:
        yield "time of our compiled step against eager", "< 1.00 ×", times(seconds["ours, compiled"], seconds["ours"])
    for stage in ("", ", compiled") if compiled else ("",):
        pair = times(seconds[f"ours{stage}"], seconds[f"nanoGPT{stage}"])
        yield f"time of our step against nanoGPT's{stage}", "≤ 1.00 ×", pair


def born(device: str) -> Iterator[Row]:
    """A grown host against one born that shape."""
    yield from grown_rows(spec_of(device), STEPS[device], "")


class Packed:
    """One of several that share the GPU."""

    def __init__(self, spec: RunSpec) -> None:
        self._trainer, self._tokens = trainer(spec, text(spec)), batch_tokens(spec)
        self.train(0.0)

    def train(self, seconds: float) -> float:
        """Tokens a second, over this time and at least a few steps."""
        done, begun = 0, time.perf_counter()
        while done < BURN_IN or time.perf_counter() - begun < seconds:
            self._trainer.step(RATE)
            self._trainer.measured(since=done)  # waits for the device
            done += 1
        self._trainer.forget()
        return done * self._tokens / (time.perf_counter() - begun)


def packed(device: str) -> Iterator[Row]:
    """Workers that share the GPU, by Ray's fractional `num_gpus`."""
    from esper.platform import cluster

    with cluster.session(cpus=max(WORKERS[device])):
        import ray

        share = 1 / max(WORKERS[device]) if device == "cuda" else 0
        make = ray.remote(num_cpus=1, num_gpus=share)(Packed)
        actors, alone = [make.remote(spec_of(device)) for _ in range(max(WORKERS[device]))], 0.0
        ray.get([actor.train.remote(0.0) for actor in actors])
        for count in WORKERS[device]:
            together = sum(ray.get([actor.train.remote(5.0) for actor in actors[:count]]))
            alone = alone or together
            told = f"{together:,.0f} tokens/s together, {together / alone:.2f} × one"
            yield f"{count} packed, each num_gpus={share:g}", "", told


def calibrate(device: str) -> Iterator[Row]:
    """The preset's clock, for `platform/presets/tinystories.json`."""
    spec = spec_of(device)
    clock, rows = fit_clock(spec, text(spec), steps=15 if device == "cuda" else 5)
    worst = max(abs(row["error"]) for row in rows)
    yield "calibrate: the formula's worst error over the shapes", "≤ 10 %", f"{worst:.1%}"
    yield "calibrate: `clock` of the preset", "", f"`{json.dumps(clock.model_dump(exclude={'kind'}))}`"


def growth(device: str) -> Iterator[Row]:
    """A run that grows by every blueprint of the preset, in bfloat16."""
    steps = 300 if device == "cuda" else 60  # on characters: fewer epochs, as a loss that overfits rises too
    budget = ("budget.axis=steps", f"budget.amount={steps}", "budget.decisions=6", "data.tokenizer=char")
    spec = spec_of(device, *budget, f"growth.probation_steps={steps // 12}")
    run, names = GrowthRun(spec, text(spec)), spec.growth.blueprints
    plan = [Entry(at=at, blueprint=name) for at, name in zip((0.1, 0.2, 0.3), names, strict=True)]
    run.reset()
    summary = play(run, SchedulePolicy(plan), arm="schedule")
    losses = [point["val_loss"] for point in summary["val_curve"]]
    moved = max(moved_by(each) for each in summary["grafts"])
    rise = max(after - before for before, after in pairwise(losses))
    outcomes = ", ".join(f"{each['blueprint']} {each['outcome']}" for each in summary["grafts"])
    yield "grown: grafts", "3, all kept", outcomes
    yield "grown: validation loss moved by a graft, nats", "≤ 0.001", f"{moved:.1e}"
    yield "grown: largest rise of validation loss in a decision", "≤ 0.1", f"{rise:+.4f}"
    yield "grown: validation loss, first to last", "", f"{losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps"
    sound = not summary["rollbacks"] and not summary["failure"] and len(summary["grafts"]) == 3
    assert sound, f"faults: {summary['rollbacks']} {summary['failure']}"
    assert moved <= 1e-3, "a graft changed what the host computes"
    assert rise <= 0.1, "the loss had a spike"


def demo(device: str) -> Iterator[Row]:
    """`esper demo` on this device: Ray's workers, PPO, MLflow, the report."""
    folder = Path(sys.argv[3]).parent.resolve()
    gpu = ("device=cuda", "fleet.gpus=0.125")
    changes = [word for each in (gpu if device == "cuda" else DEMO_REHEARSED) for word in ("--set", each)]
    command = [sys.executable, str(ROOT / "pipelines" / "demo.py"), "--data", "python-docs", "--out", "demo", *changes]
    environment, begun = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}, time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)
    yield "esper demo", "", f"{time.perf_counter() - begun:.0f} s"


SECTIONS = {each.__name__: each for each in (tests, numerics, step, growth, born, calibrate, packed, demo)}
SECTIONS["compiled"] = lambda device: step(device, compiled=True)


def main(name: str, device: str, file: Path) -> None:
    """Keep each row as soon as it is there: the section may be stopped."""
    rows: list[Row] = []
    for row in SECTIONS[name](device):
        rows.append(row)
        file.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
