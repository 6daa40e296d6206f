"""A Grower in a user's own loop: the loop's numbers while nothing grows, Esper's growth then, checkpoints of both."""

import copy
import io
import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from esper import Budget, Grower
from esper.platform import checkpoint
from esper.platform.contracts import GraftAction
from esper.platform.errors import UserError
from esper.platform.host_spec import HostSpec, ResNetSpec
from esper.platform.spec import RunSpec
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.policy import SimicPolicy
from esper.policies.tamiyo import TamiyoPolicy
from esper.workers.laws.surrogate import drawn_laws
from esper.workers.tolaria.model.resnet import ResNetHost
from esper.workers.tolaria.model.transformer import TransformerHost
from tests.pages import after_each, blocks

V, T, B = 23, 16, 8
BLUEPRINTS = {"attention": {}, "ffn": {"width": 8}, "block": {}}
GROWTH = {"min_optimizer_steps": 2, "probation_steps": 12, "blueprints": BLUEPRINTS}
TEXT = torch.randint(V, (37,), generator=torch.Generator().manual_seed(1)).repeat(100)
PLAN = [(0.0, "attention"), (0.25, "ffn"), (0.5, "block")]


def gpt(**changes):
    values = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T} | changes
    return TransformerHost(HostSpec(**values), V, torch.Generator().manual_seed(0))


def windows():
    """A batch at random places, by torch's global random numbers, as nanoGPT draws it."""
    starts = torch.randint(len(TEXT) - T - 1, (B,)).tolist()
    batch = torch.stack([TEXT[i : i + T + 1] for i in starts])
    return batch[:, :-1], batch[:, 1:]


def loss_on(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


class Loop:
    """nanoGPT's: gradient accumulation, a schedule of torch's, clipping."""

    def __init__(self, model=None, parts=1, **settings):
        torch.manual_seed(0)
        self.model, self.parts, self.losses = gpt() if model is None else model, parts, []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 48)
        self.grower, self.changes = None, []
        if settings:
            given = {"budget": Budget(steps=48, decisions=8), "growth": GROWTH, "evaluate": self.evaluate} | settings
            self.grower = Grower(self.model, self.optimizer, **given)

    def evaluate(self):
        assert not self.model.training
        assert not torch.is_grad_enabled()
        return loss_on(self.model, *windows()).item()

    def train(self, steps, spoil=None):
        for step in range(steps):
            total = torch.zeros(())
            for _ in range(self.parts):
                loss = loss_on(self.model, *windows()) / self.parts
                loss.backward()
                total += loss.detach()
            if spoil is not None:
                spoil(self, step)
            if self.grower is None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                self.changes.append(self.grower.step(total))
            self.schedule.step()
            self.losses.append(total.item())
        return self


@pytest.mark.parametrize("parts", [1, 3])
def test_while_nothing_grows_the_losses_are_those_of_the_loop_without_it(parts):
    plain = Loop(gpt(dropout=0.1), parts).train(60)
    watched = Loop(gpt(dropout=0.1), parts, controller="static").train(60)
    assert watched.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    assert watched.model.training
    summary = watched.grower.summary()
    assert watched.grower.ended
    assert (summary["steps"], summary["tokens"]) == (60, 60 * parts * B * T)  # steps after its end are counted
    assert [point["steps"] for point in summary["val_curve"]] == [0, 6, 12, 18, 24, 30, 36, 42, 48]


def test_it_grows_when_the_controller_says_so_and_the_loop_goes_on():
    loop = Loop(controller=PLAN).train(48)
    summary = loop.grower.summary()
    done = [(i, change.blueprint, change.site) for i, change in enumerate(loop.changes) if change]
    assert done == [(0, "attention", "h0.attention"), (11, "ffn", "h0.ffn"), (23, "block", "h0.stream")]
    assert [graft["outcome"] for graft in summary["grafts"]] == ["kept", "kept", "kept"]
    assert summary["parameters"] == sum(p.numel() for p in loop.model.parameters())
    assert summary["parameters"] > gpt().shape.parameters_count()
    assert loop.model.shape.depth() == 2
    held = {p for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == set(loop.model.parameters())
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the user's schedule has ended
    for graft in summary["grafts"]:  # on other windows
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=0.3)
    told = loop.grower.run.telemetry
    assert told.problems(loop.grower.run.space) is None
    assert told.get("gradient_noise_measured") == told.get("train_gap_measured") == 1
    assert sum(loop.losses[-5:]) / 5 < sum(loop.losses[:5]) / 5 - 0.3


def test_a_compiled_model_grows_too():
    losses = []
    for model in (gpt(), torch.compile(gpt(), backend="eager")):
        loop = Loop(model, controller=PLAN)
        for step in range(48):
            torch.manual_seed(step)
            loop.train(1)
        losses.append(loop.losses)
        assert len(loop.grower.run.grafts) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def wait_then_first(telemetry):
    return int(telemetry.legal()[-1]) if telemetry.sequence == 2 else 0


class Second:
    """A policy of the user's own, with a memory."""

    def __init__(self):
        self.seen = 0

    def act(self, telemetry, probe=None):
        self.seen += 1
        return GraftAction(int(telemetry.legal()[-1]) if self.seen == 2 else 0, telemetry.sequence, "second")

    def state(self):
        return self.seen

    def resume(self, state):
        self.seen = state


@pytest.mark.parametrize(
    ("controller", "grafts"),
    [("static", 0), ("tamiyo", None), ("onejump", 1), ("random", None), (wait_then_first, 1), (Second(), 1)],
)
def test_controllers(controller, grafts):
    loop = Loop(controller=controller).train(48)
    assert loop.grower.ended
    assert grafts in (None, len(loop.grower.run.grafts))


def test_a_policy_that_was_trained_plays_here_unless_on_other_telemetry(tmp_path):
    policy = SimicPolicy(ControllerNet(8))
    policy.save(tmp_path / "policy.safetensors")
    assert Loop(controller=tmp_path).train(48).grower.ended
    checkpoint.write(tmp_path / "policy.safetensors", policy.card | {"telemetry_version": 2}, policy.net.state_dict())
    model = gpt()
    with pytest.raises(UserError, match="telemetry version 2, but this code reads 3: train it again"):
        Loop(model, controller=str(tmp_path))
    assert not model._forward_pre_hooks


def test_the_planner_plans_by_laws(tmp_path):
    (tmp_path / "laws.json").write_text(drawn_laws(RunSpec(), range(4)).model_dump_json())
    loop = Loop(controller="planner", laws=tmp_path / "laws.json").train(48)
    assert loop.grower.ended
    assert all("expected to end at" in graft.reason for graft in loop.grower.run.grafts)
    with pytest.raises(UserError, match="a step of this loop has 100 tokens: take batches of the host's whole context"):
        Loop(controller="planner", laws=tmp_path / "laws.json", tokens_per_step=100).train(1)


def grown(host, optimizer, x, plan, **settings):
    """What a host that tells ten classes apart has come to by a plan, in 40 steps on one batch."""
    labels = torch.arange(len(x)) % 10

    def evaluate():
        return F.cross_entropy(host(x), labels)

    given = {"evaluate": evaluate, "growth": {"min_optimizer_steps": 1}} | settings
    grower = Grower(host, optimizer, plan, **given)
    while not grower.ended:
        loss = evaluate()
        loss.backward()
        grower.step(loss)
    summary = grower.summary()
    assert [graft["blueprint"] for graft in summary["grafts"]] == [blueprint for _, blueprint in plan]
    for graft in summary["grafts"]:
        assert graft["val_loss_after"] == pytest.approx(graft["val_loss_before"], abs=1e-5)
    return summary


def test_a_resnet_grows_too():
    torch.manual_seed(0)
    spec = ResNetSpec(n_layer=1, channels=4, group=4, image_size=8, image_channels=1)
    host = ResNetHost(spec, 10, torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(host.parameters(), lr=0.05, momentum=0.9)
    plan, budget = [(0.2, "conv_width"), (0.4, "conv_block")], Budget(tokens=40 * 32, decisions=8)
    summary = grown(host, optimizer, torch.randn(32, 1, 8, 8), plan, budget=budget)
    assert (summary["steps"], summary["tokens"]) == (40, 1280)
    assert summary["val_loss"] < summary["val_curve"][0]["val_loss"]


def test_a_host_of_another_kind_grows_once_it_is_told_how_many_outputs_there_are():
    [page] = after_each(blocks("your-own-model.md")[2:3])
    layers = (page["Layer"](uid=0, width=16),)
    host = page["MLPHost"](page["MLPShape"](64, 32, 10, born=page["Layer"](uid=1, width=16), layers=layers))
    optimizer, x, budget = adam(host), torch.randn(32, 64), Budget(steps=40, decisions=8)
    Grower(host, optimizer, budget=budget, evaluate=lambda: 1.0)  # as the page's own tells
    del page["MLPHost"].OUTPUTS
    with pytest.raises(UserError, match=r"outputs= is missing or below 2, .*: give the size of the vocabulary, or"):
        grown(host, optimizer, x, [], budget=budget)
    grown(host, optimizer, x, [(0.2, "ffn"), (0.4, "block")], budget=budget, outputs=10)
    assert host.shape.depth() == 2


def test_a_budget_of_time_is_measured_and_foretold_by_what_steps_take():
    begun = time.perf_counter()
    loop = Loop(controller="static", budget=Budget(seconds=2.0, decisions=4))
    while not loop.grower.ended:
        loop.train(1)
    ledger, run = loop.grower.run.ledger, loop.grower.run
    assert 2.0 <= ledger.seconds < time.perf_counter() - begun
    before, after = run.curve[-2:]
    steps = after["steps"] - before["steps"]
    assert run.layout.step_seconds == pytest.approx((after["seconds"] - before["seconds"]) / steps)


def poison(loop, step):
    if loop.grower.run and loop.grower.run.kasmina.seeds and not loop.grower.run.rollbacks:
        next(loop.model.parameters()).grad.fill_(math.nan)


def test_a_fault_takes_the_graft_back_and_the_loop_goes_on(capsys):
    loop = Loop(controller=[(0.25, "ffn")]).train(12)
    assert len(loop.grower.run.kasmina.seeds) == 1
    before = copy.deepcopy(loop.model.state_dict())
    loop.train(6, poison)
    (rollback,) = loop.grower.run.rollbacks
    assert (rollback.fault, rollback.removed) == ("a gradient was not finite", "ffn at h0.ffn")
    assert "ffn at h0.ffn removed" in capsys.readouterr().err
    assert loop.model.shape == gpt().shape
    assert [graft.outcome for graft in loop.grower.run.grafts] == ["rolled back"]
    loop.train(30)
    assert loop.grower.ended
    assert loop.grower.run.failure is None
    assert before["h.0.mlp.c_fc.weight"].shape[0] == gpt().shape.layers[0].width + 8


def test_after_a_rollback_weights_and_moments_are_as_at_the_start_of_the_slice():
    loop = Loop(controller="static").train(12)
    weights, moments = copy.deepcopy(loop.model.state_dict()), copy.deepcopy(loop.optimizer.state_dict()["state"])
    loop.train(6, lambda loop, step: next(loop.model.parameters()).grad.fill_(math.nan) if step == 5 else None)
    assert len(loop.grower.run.rollbacks) == 1
    assert all(torch.equal(weights[name], tensor) for name, tensor in loop.model.state_dict().items())
    for key, values in loop.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[key][name], value) for name, value in values.items())
    assert loop.optimizer.param_groups[0]["lr"] == loop.schedule.get_last_lr()[0]  # the rate goes on


def test_three_faults_in_a_row_end_it_with_the_model_sound():
    loop = Loop(controller="static").train(12)
    weights = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(UserError, match="given up: a gradient was not finite, 3 times in a row; "):
        loop.train(40, lambda loop, step: next(loop.model.parameters()).grad.fill_(math.nan))
    assert all(torch.equal(weights[name], tensor) for name, tensor in loop.model.state_dict().items())


@pytest.mark.parametrize("at", [0, 1, 12, 27, 44])
def test_a_checkpoint_goes_on_to_the_same_numbers(at):
    """With grafts inside a slice, a policy that remembers, and the scheduler's own state."""

    def begun():
        loop = Loop(controller=PLAN)
        loop.schedule = torch.optim.lr_scheduler.LinearLR(loop.optimizer, 1.0, 0.1, 60)
        return loop

    whole, first = begun().train(56), begun().train(at)
    file = io.BytesIO()
    torch.save([first.grower.state_dict(), first.schedule.state_dict(), torch.get_rng_state()], file)
    file.seek(0)
    (grower, schedule, random), second = torch.load(file), begun()  # weights only: nothing is unpickled
    second.grower.load_state_dict(grower)
    second.schedule.load_state_dict(schedule)
    torch.set_rng_state(random)
    second.train(56 - at)
    assert first.losses + second.losses == whole.losses
    ours, theirs = second.grower.summary(), whole.grower.summary()
    for told in (ours, theirs):
        told.pop("val_curve")
        told.pop("rewards")  # of rent by the measured clock
        told.pop("wall_seconds")
        told.pop("validation_seconds")
    assert ours == theirs
    with pytest.raises(UserError, match="has been trained already: make the model as it was then, and a new Grower"):
        second.grower.load_state_dict(grower)


def test_a_state_that_does_not_fit_is_refused():
    saved = Loop(controller=PLAN).train(20).grower.state_dict()
    for loop, what in (
        (Loop(gpt(n_embd=32), controller=PLAN), "of a model that began otherwise"),
        (Loop(controller=PLAN, budget=Budget(steps=99)), "with other settings: give it the same ones, its budget too"),
    ):
        before = copy.deepcopy(loop.model.state_dict())
        with pytest.raises(UserError, match=what):
            loop.grower.load_state_dict(saved)
        assert all(torch.equal(before[name], tensor) for name, tensor in loop.model.state_dict().items())
    with pytest.raises(UserError, match="no state of a Grower"):
        Loop(controller=PLAN).grower.load_state_dict({"model": {}})


def grafts_twice(telemetry):
    return int(telemetry.legal()[-1]) if telemetry.sequence in (1, 3) else 0


def on_a_rank(rank, folder):
    """Trains on its half of the batches; only rank 0 has a controller that knows what to do."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = DistributedDataParallel(gpt())

    def decide(telemetry):
        assert rank == 0
        return grafts_twice(telemetry)

    loop = Loop(model, controller=decide, evaluate=lambda: 1.0 + rank)
    for step in range(48):
        torch.manual_seed(step)
        halves = windows(), windows()
        loss = loss_on(model, *halves[rank])
        loss.backward()
        loop.grower.step(loss)
        loop.losses.append(loss.item())
    optimized = loop.optimizer.state_dict()["state"]
    told = model.module.state_dict(), optimized, loop.grower.summary(), loop.losses
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_grow_alike_from_one_decision_and_as_one_process_on_both_halves(tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    (weights, moments, first, losses), (others, other_moments, second, other_losses) = one, other
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())
    assert all(torch.equal(moments[i][key], value) for i, kept in other_moments.items() for key, value in kept.items())
    assert [graft["decision"] for graft in first["grafts"]] == [1, 3]
    assert first["val_loss"] == second["val_loss"] == 1.0
    assert first["tokens"] == 48 * 2 * B * T
    alone = Loop(controller=grafts_twice)
    for step in range(48):
        torch.manual_seed(step)
        halves = [loss_on(alone.model, *batch) for batch in (windows(), windows())]
        loss = (halves[0] + halves[1]) / 2
        loss.backward()
        alone.grower.step(loss)
        mean = (losses[step] + other_losses[step]) / 2
        assert mean == pytest.approx(loss.item(), abs=0.01)  # Adam magnifies rounding


class Illegal:
    def act(self, telemetry, probe=None):
        return GraftAction(99, telemetry.sequence)


class Trying:
    def act(self, telemetry, probe=None):
        probe.twins([GraftAction(0, telemetry.sequence)], 3)


def tie(host):
    host.h[1].mlp.c_fc.weight = host.h[0].mlp.c_fc.weight
    return host


def tie_head(host):
    host.lm_head.weight = host.wte.weight
    return host


def without_linears():
    host = gpt()
    host.linears = None
    return host


def adam(model):
    return torch.optim.AdamW(model.parameters())


PLAIN = torch.nn.Sequential(torch.nn.Linear(2, 2))
BAD = {
    "no host": (lambda: PLAIN, adam, {}, "Sequential is no host that can grow: it lacks shape"),
    "wrapped": (lambda: torch.nn.DataParallel(gpt()), adam, {}, "DataParallel around a model cannot follow a graft: "),
    "part of it": (gpt, lambda m: torch.optim.AdamW(m.h.parameters()), {}, "lacks 4 of the model's 16 tensors"),
    "another's": (gpt, lambda m: adam(gpt()), {}, "lacks 16 of the model's 16 tensors and holds 16 others"),
    "tied": (lambda: tie(gpt(n_layer=2)), adam, {}, r"h.0.mlp.c_fc.weight and h.1.mlp.c_fc.weight are one tensor"),
    "head": (lambda: tie_head(gpt(tied=False)), adam, {}, "as if others were tied: tie what the host's settings say"),
    "arm": (gpt, adam, {"controller": "tamyo"}, "Did you mean 'tamiyo'"),
    "lag": (gpt, adam, {"controller": "lag"}, "grafts cannot be tried on copies where the batches are the loop's own"),
    "no policy": (gpt, adam, {"controller": "runs/none"}, "policy runs/none does not exist: name a folder"),
    "no function": (gpt, adam, {"controller": 3}, "arm '3' has no act.telemetry, probe. and is no function"),
    "blueprint": (gpt, adam, {"controller": [(0.1, "blok")]}, "unknown blueprint in the schedule 'blok'"),
    "no laws": (gpt, adam, {"controller": "planner"}, "arm 'planner' needs fitted laws: give laws=FILE, made by"),
    "no file": (gpt, adam, {"controller": "plan.json"}, "the schedule plan.json does not exist: name a file, or"),
    "unnamed": (gpt, adam, {"controller": "schedule"}, "arm 'schedule' needs a file, which a Grower"),
    "no method": (without_linears, adam, {}, "can grow: its linears must be a method, and is None: docs"),
    "closure": (gpt, lambda m: torch.optim.LBFGS(m.parameters()), {}, "LBFGS.step needs a closure: take an optim"),
    "no evaluate": (gpt, adam, {"evaluate": 3.0}, "evaluate is 3.0: give a function that returns the validation loss"),
    "a number": (gpt, adam, {"budget": 100}, r"budget is 100: it must be a Budget, as in budget=Budget.steps=20_000"),
    "budget": (gpt, adam, {"budget": Budget()}, "a Budget is on one axis, and this one has 0"),
    "two budgets": (gpt, adam, {"budget": Budget(steps=1, tokens=1)}, "on one axis, and this one has 2"),
    "growth": (gpt, adam, {"growth": {"max_layer": 3}}, "unknown key in the Grower's settings 'growth.max_layer'"),
    "clip": (gpt, adam, {"clip": 0.0}, "clip is 0.0: it must be above 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_sentence_and_changes_nothing(what):
    make, optimize, settings, sentence = BAD[what]
    model = make()
    optimizer, before = optimize(model), copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=sentence):
        Grower(model, optimizer, **{"budget": Budget(steps=9), "evaluate": lambda: 1.0} | settings)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"controller": Illegal()}, "action 99 is not legal here"),
        ({"controller": lambda telemetry: 1 / 0}, r"raised ZeroDivisionError .*test_grow.py, line \d+: mend it"),
        ({"controller": Trying()}, "grafts cannot be tried on copies where the batches are the loop's own"),
        ({"evaluate": lambda: "low"}, "evaluate.. returned 'low': it must return a loss above 0"),
        ({"evaluate": lambda: torch.ones(2)}, r"returned \[1.0, 1.0\]: it must return a loss above 0, one number of"),
        ({"evaluate": lambda: math.nan}, "evaluate.. returned nan before the first step"),
        ({"budget": Budget(tokens=9)}, "the budget is 9 tokens, and one optimizer step uses 128: set a larger"),
    ],
)
def test_what_is_wrong_only_once_it_trains_is_a_sentence_too(settings, sentence):
    loop = Loop(**{"controller": "static"} | settings)
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(UserError, match=sentence):
        loop.train(40)
    if "controller" not in settings:
        assert all(torch.equal(before[name], tensor) for name, tensor in loop.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"growth": {"min_optimizer_steps": 7}}, "6 steps after a graft, and growth.min_optimizer_steps is 7, so"),
        ({"growth": {"max_layers": 1, "blueprints": {"block": {}}}}, "nothing would ever be grafted: growth.max_"),
        ({"growth": {"min_optimizer_steps": 6}}, ""),
        ({"growth": {"min_optimizer_steps": 7}, "controller": "static"}, ""),
    ],
)
def test_bad_settings_by_which_nothing_could_be_grafted_are_told_at_the_start(settings, sentence, capfd):
    Loop(**{"controller": "onejump"} | settings).train(2)
    told = capfd.readouterr().err
    assert (sentence in told and told.count("\n") == 1) if sentence else not told


def test_a_tensor_is_asked_for_and_a_count_of_tokens_where_it_cannot_be_made():
    loop = Loop(controller=TamiyoPolicy())
    with pytest.raises(UserError, match=r"grower.step got 1.5: give it the loss, a tensor"):
        loop.grower.step(1.5)
    loss = F.cross_entropy(loop.model(idx=TEXT[None, :T])[0], TEXT[1 : T + 1])
    loss.backward()
    with pytest.raises(UserError, match="tokens_per_step could not be counted"):
        loop.grower.step(loss)


def test_a_loop_that_lacks_backward_or_steps_itself_is_told_and_goes_on_once_it_is_mended():
    loop = Loop(controller="static").train(2)
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(UserError, match=r"no parameter of the model has a gradient: call loss.backward\(\) before"):
        loop.grower.step(loss_on(loop.model, *windows()))
    loop.optimizer.step()  # without gradients it changes nothing
    with pytest.raises(UserError, match=r"since the last grower.step, which steps it itself: leave optimizer.step\(\)"):
        loop.train(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in loop.model.state_dict().items())
    assert loop.train(2).grower.summary()["steps"] == 4
