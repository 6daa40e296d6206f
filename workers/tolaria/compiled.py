"""A training step as one package: loss, gradient, clip and AdamW, compiled ahead of time by torch's inductor.

A process of its own builds it into a cache that runs share; a run loads it in milliseconds and traces nothing.
Parameters and moments are its inputs and change in place: evaluation, saving and copies see nothing of it.
"""

import atexit
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from esper.platform.clock import ClockSpec
from esper.platform.errors import UserError
from esper.platform.host_spec import HostSpec
from esper.platform.spec import OptimizerSpec, RunSpec
from esper.platform.storage import cache, write_bytes, write_text
from esper.workers.tolaria.hosts import AnyHost, start_shape
from esper.workers.tolaria.model.transformer import TransformerHost

BUILD_SECONDS = 45.0  # of a core; 20 to 60 were measured for 1 to 4 layers
LEAST_SAVED = 0.05  # of a step's time, to be worth other last bits
BUILD_LIMIT = 240  # seconds, then a build has failed: less than `fleet.grace`, in which a waiting worker must answer

_builds: dict[Path, subprocess.Popen] = {}  # begun by this process
_loaders: dict[Path, Any] = {}  # a library is loaded once: a process cannot let go of it


def unfit(spec: RunSpec, experts: int, device: str) -> str | None:
    """What of a host with so many experts a compiled step cannot do, if anything."""
    if not isinstance(spec.host, HostSpec):
        return f"a {spec.host.kind}"
    found = {
        "dropout": spec.host.dropout > 0,  # would draw other numbers
        "attention by flash-attn": spec.host.attention != "sdpa",
        "experts": experts > 0,  # whose shapes depend on the data
        "bfloat16 on a CPU": spec.dtype == "bfloat16" and device == "cpu",  # whose roundings carry the two paths apart
    }
    return next((what for what, there in found.items() if there), None)


def compiler() -> str | None:
    """The C++ compiler that inductor would call, if it is there."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def check(spec: RunSpec) -> None:
    """Raise UserError where `trainer.compile` is on but cannot be followed here."""
    on_gpu = spec.device == "cuda" or (spec.device == "auto" and torch.cuda.is_available())
    what = unfit(spec, start_shape(spec, vocab_size=1).experts(), "cuda" if on_gpu else "cpu")
    if spec.trainer.compile == "on" and what is not None:
        raise UserError(f"trainer.compile is 'on', but {what} cannot be compiled: set it to auto, or do without.")
    if spec.trainer.compile == "on" and compiler() is None:
        missing = f"there is no C++ compiler {os.environ.get('CXX') or 'g++'!r} here"
        raise UserError(f"trainer.compile is 'on', but {missing}: install one, name one in CXX, or set it to off.")


def pays(clock: ClockSpec, depth: int, step_seconds: float, steps: float) -> bool:
    """Whether `steps` more steps, of so many predicted seconds, save more than a build takes.

    A compiled step saves about what the clock says that a step costs whatever its size (0.6 of it was measured for
    `demo`, 1 to 2 for `tinystories-char`); nothing where matrix products are nearly all of the time.
    """
    saved = clock.base_seconds + clock.layer_seconds * depth
    return saved * steps > BUILD_SECONDS and saved > LEAST_SAVED * step_seconds


class Package:
    """The compiled step of a host's shape: a file in the cache, to be built, or known to fail."""

    def __init__(self, spec: RunSpec, host: AnyHost, device: str) -> None:
        layers = [layer.model_copy(update={"uid": i}) for i, layer in enumerate(host.shape.layers)]
        sizes = {"n_layer": len(layers), "layers": tuple(layers), "head_dim": host.shape.head_dim}
        unused = {"n_head": 1, "mlp_width": None}
        optimizer = {"betas", "eps", "weight_decay", "grad_clip"}
        content = {
            "host": host.spec.model_copy(update=sizes | unused).model_dump(mode="json"),
            "vocab_size": host.shape.vocab_size,
            "batch_size": spec.data.batch_size,
            "optimizer": spec.optimizer.model_dump(mode="json", include=optimizer),
            "dtype": spec.dtype,
            "threads": spec.threads,
            "device": device,
            "made_for": [*_machine(), torch.cuda.get_device_name() if device == "cuda" else ""],
        }
        self.order = json.dumps(content, sort_keys=True)
        self.path = cache("steps") / f"{hashlib.sha256(self.order.encode()).hexdigest()[:24]}.pt2"

    @property
    def there(self) -> bool:
        return self.path.exists()

    @property
    def failed(self) -> bool:
        """Whether a build has failed, in any run of this machine: all of them stay eager, to equal numbers."""
        begun = _builds.get(self.path)
        return not self.there and (self.failure.exists() or (begun is not None and begun.poll() is not None))

    @property
    def failure(self) -> Path:
        return self.path.with_suffix(".failed")

    def building(self) -> bool:
        """Whether it is being built; begins that where it is neither there nor known to fail."""
        if self.there or self.failed:
            return False
        if self.path not in _builds:
            command = [sys.executable, "-P", "-m", __name__, self.order, str(self.path)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            # In a group of its own, as Ctrl-C is for the run, whose end ends its builds. In a session of its own Linux
            # would give it as much of the core as the run has, niced or not.
            _builds[self.path] = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
            )
        return True

    def loader(self) -> Any:
        """torch's loader of it; None, and a failure from now on, where it cannot be loaded."""
        # torch._inductor.aoti_load_package imports the compiler, 2 s, to put the inputs in a list.
        aoti: Any = getattr(torch._C, "_aoti")  # noqa: B009  (its stubs leave it out)
        try:
            if self.path not in _loaders:
                _loaders[self.path] = aoti.AOTIModelPackageLoader(str(self.path), "model", True, 1, -1)
        except RuntimeError as error:
            with suppress(OSError):
                write_text(self.failure, str(error))
                self.path.unlink(missing_ok=True)
        return _loaders.get(self.path)


class CompiledStep:
    """A package bound to a host's parameters and their AdamW states, while these stay the same tensors.

    n parameters, each of which has taken an eager step. A copy has to be bound anew.
    """

    def __init__(self, loader: Any, host: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._loader = loader
        self.parameters = list(host.parameters())
        states = [optimizer.state[parameter] for parameter in self.parameters]
        self._steps = torch.stack([state["step"] for state in states])  # (n,), of which the states have views
        for state, step in zip(states, self._steps.unbind(), strict=True):
            state["step"] = step
        moments = [state[key] for key in ("exp_avg", "exp_avg_sq") for state in states]
        self._tensors = [*(parameter.detach() for parameter in self.parameters), *moments, self._steps]  # (3n + 1,)
        self._rate = self._steps.new_zeros(())
        self.squares: Tensor | None = None  # (n,), sums of squares of the last step's clipped gradients

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One optimizer step in place on int64 (B, T) → loss, and the gradient's norm before clipping."""
        self._steps += 1
        self._rate.fill_(rate)
        batch = inputs.contiguous(), targets.contiguous()
        loss, norm, self.squares = self._loader.boxed_run([*self._tensors, *batch, self._rate])
        return loss, norm


def _build(content: dict[str, Any]) -> bytes:
    """Trace and compile the step that an order describes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.set_num_threads(content["threads"])
    spec, device = HostSpec.model_validate(content["host"]), content["device"]
    host = TransformerHost(spec, content["vocab_size"]).to(device)
    weights = [parameter.detach() for parameter in host.parameters()]
    batch = torch.zeros(content["batch_size"], spec.block_size, dtype=torch.int64, device=device)
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    steps = torch.ones(len(weights), device=device)
    arguments = (weights, *moments, steps, batch, batch.clone(), torch.zeros((), device=device))
    step = _step(host, OptimizerSpec(**content["optimizer"]), content["dtype"])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # tens of MB a build, of use to none other
        exported = torch.export.export(make_fx(step)(*arguments), arguments)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/step.pt2")
        return Path(package).read_bytes()


def _step(host: TransformerHost, spec: OptimizerSpec, dtype: str) -> Callable[..., tuple[Tensor, ...]]:
    """The step as a function of tensors, the first three lists of them in the order of the host's parameters."""
    names, (beta1, beta2) = [name for name, _ in host.named_parameters()], spec.betas
    decays = [spec.weight_decay if parameter.dim() >= 2 else 0.0 for parameter in host.parameters()]

    def step(
        weights: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: Tensor,  # (n,), this one counted
        inputs: Tensor,
        targets: Tensor,
        rate: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False):
                logits = functional_call(host, dict(zip(names, leaves, strict=True)), (inputs,))
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            gradients = torch.autograd.grad(loss, leaves)
        squares = torch.stack([gradient.square().sum() for gradient in gradients])
        norm = squares.sum().sqrt()
        scale = (spec.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        size = (rate / (1 - beta1 ** steps.double())).float()  # (n,)
        root = (1 - beta2 ** steps.double()).sqrt().float()  # (n,)
        for i, (weight, mean, square) in enumerate(zip(weights, first, second, strict=True)):
            gradient = gradients[i] * scale
            mean.copy_(mean + (gradient - mean) * (1 - beta1))
            square.copy_(square * beta2 + gradient * gradient * (1 - beta2))
            weight.copy_(weight * (1 - rate * decays[i]) - size[i] * mean / (square.sqrt() / root[i] + spec.eps))
        return loss.detach(), norm, squares * scale.square()

    return step


@functools.cache
def _machine() -> tuple[str, ...]:
    """What else a package depends on: code that is traced, torch, the C library, the processor's instructions."""
    here, info = Path(__file__), Path("/proc/cpuinfo")
    code = b"".join(path.read_bytes() for path in (here, *sorted((here.parent / "model").glob("*.py"))))
    flags = re.search(r"^(flags|Features)\s*:.*$", info.read_text() if info.exists() else "", re.MULTILINE)
    found = code, (flags[0] if flags else torch.backends.cpu.get_cpu_capability()).encode()
    return torch.__version__, *platform.libc_ver(), *(hashlib.sha256(each).hexdigest() for each in found)


@atexit.register
def end_builds() -> None:
    """End those that this process has begun, compilers included."""
    for build in _builds.values():
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGTERM)
        build.wait()
    _builds.clear()


def main(order: str, path: Path) -> None:
    """Build a package, niced, whole or not at all; of processes that want the same one, one does."""
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and temporary folders go
    failure = path.with_suffix(".failed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() or failure.exists():
            return
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(BUILD_LIMIT)
        try:
            # Whether the compiler works is known at once; tracing a step takes ten seconds.
            subprocess.run([str(compiler()), "-x", "c++", "-fsyntax-only", os.devnull], check=True)
            write_bytes(path, _build(json.loads(order)))
        except Exception as error:
            with suppress(OSError):
                if not isinstance(error, TimeoutError):  # another day the machine may be less busy
                    write_text(failure, traceback.format_exc())
            raise


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a build took more than {BUILD_LIMIT} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
