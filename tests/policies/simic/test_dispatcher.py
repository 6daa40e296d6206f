"""The dispatcher's rules (its docstring has them), on toy runs in this process and in Ray actors."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from simic_toy import DECISIONS, SPACE, ToyRun

from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.seeding import derive
from esper.policies.simic import dispatcher as module
from esper.policies.simic import fleet as fleets
from esper.policies.simic.dispatcher import Dispatcher, Progress
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.worker_table import Deadlines
from esper.workers.actor import GrowthWorker
from esper.workers.worker import EpisodeWorker


def make_net(seed: int = 0) -> ControllerNet:
    torch.manual_seed(seed)
    net = ControllerNet(8)
    with torch.no_grad():
        net.score[-1].weight.normal_()
    return net


@pytest.fixture
def make():
    """Make dispatchers that are stopped at the end."""
    made = []

    def dispatcher(fleet, *, seed=0, ahead=10_000, **kwargs) -> Dispatcher:
        made.append(Dispatcher(fleet, make_net(), SPACE, seed=seed, ahead=ahead, **kwargs))
        return made[-1]

    yield dispatcher
    for each in made:
        each.stop()


def local(make_run):
    """What makes a worker in this process."""
    return lambda: EpisodeWorker(make_run)


def threaded(make_run, n: int) -> LocalFleet:
    """A fleet in this process that is served from the dispatcher's thread all the same."""
    fleet = LocalFleet(local(make_run), n)
    fleet.lockstep = False
    return fleet


def actors(runs, storage: str | None = None) -> RayFleet:
    """An actor for each of `runs`; those that take the place of one have the last."""
    waiting = list(runs)
    run = lambda: waiting.pop(0) if len(waiting) > 1 else waiting[0]  # noqa: E731
    return RayFleet(lambda: GrowthWorker.options(num_cpus=0.1).remote(run(), storage), lambda: len(runs))


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_whole_episodes_with_what_chose_each_action(make):
    episodes = make(LocalFleet(local(ToyRun), 3)).collect(100)
    assert sum(map(len, episodes)) >= 100
    for episode in episodes:
        assert len(episode) == DECISIONS
        assert episode.is_terminated
        assert episode.is_numpy
        logits = episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
        actions = episode.get_actions()
        observations = episode.get_observations(slice(0, DECISIONS))
        assert logits.shape == (DECISIONS, SPACE.candidates)
        assert (observations["mask"][np.arange(DECISIONS), actions] == 1).all()
        log_p = torch.from_numpy(logits).log_softmax(-1).numpy()[np.arange(DECISIONS), actions]
        np.testing.assert_allclose(log_p, episode.get_extra_model_outputs(Columns.ACTION_LOGP), rtol=1e-6)
        recomputed = make_net().logits({name: torch.from_numpy(a) for name, a in observations.items()})
        np.testing.assert_allclose(logits, recomputed.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_episodes_have_their_seeds_and_instances(make):
    seeds, instances = [], []

    class Recorded(ToyRun):
        def reset(self, instance=None, seed=0):
            seeds.append(seed)
            instances.append(instance)
            return super().reset(instance, seed)

    chosen = [Instance(n_layer=1 + i) for i in range(99)]
    make(LocalFleet(local(Recorded), 2), seed=7, start=Progress(learned=5), instances=lambda i: chosen[i]).collect(
        4 * DECISIONS
    )
    assert seeds[:4] == [derive(7, "episode", i) for i in (5, 6, 7, 8)]
    assert instances[:4] == chosen[5:9]


def test_choices_do_not_depend_on_the_fleet(make):
    one, four = (make(LocalFleet(local(ToyRun), n), seed=3).collect(8 * DECISIONS) for n in (1, 4))
    other = {episode.id_: episode for episode in four}
    for episode in one:
        np.testing.assert_array_equal(episode.get_actions(), other[episode.id_].get_actions())
        np.testing.assert_array_equal(episode.get_rewards(), other[episode.id_].get_rewards())


def test_new_weights_come_between_batches_and_leave_their_number(make):
    dispatcher = make(LocalFleet(local(ToyRun), 3))
    first = dispatcher.collect(3 * DECISIONS)
    for _ in range(DECISIONS // 2):  # into the next episodes
        dispatcher._turn()
    dispatcher.set_weights(make_net(1).state_dict(), 1)
    second = dispatcher.collect(8 * DECISIONS)
    numbers = [episode.get_extra_model_outputs(WEIGHTS_SEQ_NO) for episode in (*first, *second)]
    assert set(np.concatenate(numbers[: len(first)])) == {0}
    assert all((np.diff(each) >= 0).all() for each in numbers)
    assert set(numbers[-1]) == {1}
    assert any(set(each) == {0, 1} for each in numbers), "episodes under way go on with the new weights"
    mixed = next(e for e in second if set(e.get_extra_model_outputs(WEIGHTS_SEQ_NO)) == {0, 1})
    observations = {name: torch.from_numpy(a) for name, a in mixed.get_observations(slice(0, DECISIONS)).items()}
    for k, number in enumerate(mixed.get_extra_model_outputs(WEIGHTS_SEQ_NO)):
        expected = make_net(number).logits(observations)[k].detach().numpy()
        np.testing.assert_allclose(
            mixed.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)[k], expected, rtol=1e-5, atol=1e-5
        )


class Poisoned(EpisodeWorker):
    """Spoils the answers to some orders: those of episode 1 at decision 3, `times` times."""

    left = 0

    def advance(self, order):
        reply = super().advance(order)
        if (order.episode, len(order.actions)) == (1, 3) and Poisoned.left:
            Poisoned.left -= 1
            return spoilt(reply, Poisoned.how)
        return reply


def spoilt(reply, how):
    transition, telemetry = reply.answer, reply.telemetry
    arrays = {"globals": telemetry.globals.copy(), "sites": telemetry.sites, "mask": telemetry.mask.copy()}
    if how == "not finite":
        arrays["globals"][0] = np.nan
    elif how == "shape":
        arrays["sites"] = telemetry.sites[:-1]
    elif how == "wait is not legal":
        arrays["mask"][0] = False
    changed = replace(telemetry, **arrays, version=2 if how == "version" else telemetry.version)
    if how == "older request":
        changed = replace(telemetry, sequence=2)
    if how == "no outcome":
        return replace(reply, answer=changed)
    if how == "no duration":
        return replace(reply, expected=np.inf)
    if how == "unreadable":
        return replace(reply, answer=replace(transition, reward=None))
    if how == "another episode":
        return replace(reply, episode=0)
    return replace(reply, answer=replace(transition, telemetry=changed, reward=np.nan if how == "reward" else 1.0))


@pytest.mark.parametrize(
    "how",
    [
        *("not finite", "shape", "version", "reward", "older request", "another episode", "no outcome"),
        *("wait is not legal", "no duration", "unreadable"),
    ],
)
def test_poison_is_refused_counted_and_never_learned_from(make, how, capfd):
    def returns(fleet):
        dispatcher = make(fleet)
        episodes = dispatcher.collect(4 * DECISIONS)
        return dispatcher, {int(episode.id_): episode.get_rewards().tolist() for episode in episodes}

    _, expected = returns(LocalFleet(local(ToyRun), 2))
    Poisoned.left, Poisoned.how = 2, how
    dispatcher, found = returns(LocalFleet(lambda: Poisoned(ToyRun), 2))
    assert Poisoned.left == 0
    assert found == expected  # another worker did it again, to the same end
    assert dispatcher.counts["refused"] == 2
    assert dispatcher.counts["failures"] == dispatcher.counts["dropped"] == 0
    assert "refused" in capfd.readouterr().err


def test_an_episode_that_stays_poisoned_is_dropped_and_listed(make):
    Poisoned.left, Poisoned.how = 3, "not finite"
    dispatcher = make(LocalFleet(lambda: Poisoned(ToyRun), 2))
    found = [int(episode.id_) for episode in dispatcher.collect(6 * DECISIONS)]
    assert sorted(found) == [0, *range(2, 7)]
    assert dispatcher.dropped == [1]
    assert dispatcher.counts["refused"] == 3


def test_a_run_that_raises_is_done_again_by_another(make):
    numbers = count()
    make_run = lambda: ToyRun(fail_at=2 if next(numbers) == 0 else None)  # noqa: E731
    dispatcher = make(LocalFleet(local(make_run), 2))
    assert sorted(int(episode.id_) for episode in dispatcher.collect(4 * DECISIONS)) == [0, 1, 2, 3]
    assert dispatcher.counts["failures"] == 1
    assert dispatcher.counts["redone"] == 2  # what the run without a save had done before


def test_gives_up_when_nothing_but_failure_happens(make):
    with pytest.raises(UserError, match=r"12 episodes in a row were lost.*RuntimeError: the toy broke"):
        make(LocalFleet(local(lambda: ToyRun(fail_at=2)), 2)).collect(8)


def test_what_a_user_can_mend_ends_it_at_once(make):
    dispatcher = make(LocalFleet(local(lambda: ToyRun(fail_at=0, error=UserError("no such data: prepare it."))), 2))
    with pytest.raises(UserError, match=r"^no such data: prepare it\.$"):
        dispatcher.collect(8)
    assert dispatcher.counts["failures"] == 1


def test_an_error_in_the_thread_surfaces(make):
    fleet = threaded(ToyRun, 2)
    fleet.ready = lambda timeout: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make(fleet).collect(8)


def test_the_fleet_rests_when_it_is_far_ahead_and_goes_on(make):
    dispatcher = make(threaded(ToyRun, 3), ahead=5 * DECISIONS)
    dispatcher.collect(DECISIONS)

    # Between two episodes a seat is empty for a moment, so empty seats alone do not tell that the fleet rests.
    def resting() -> bool:
        return dispatcher.ready() >= 5 * DECISIONS and all(w.state == "resting" for w in dispatcher.workers())

    wait_until(resting)
    queued = dispatcher.ready()
    assert queued < (5 + 3) * DECISIONS
    assert queued % DECISIONS == 0
    assert sum(map(len, dispatcher.collect(20 * DECISIONS))) == 20 * DECISIONS


def test_workers_are_served_while_the_learner_is_busy(make):
    dispatcher = make(threaded(lambda: ToyRun(seconds=0.005), 2))
    dispatcher.collect(DECISIONS)
    before = dispatcher.ready()
    wait_until(lambda: dispatcher.ready() >= before + 4 * DECISIONS)  # this thread, the learner's, does nothing
    assert 0.0 < dispatcher.busy_fraction() <= 1.0


def test_a_slow_worker_holds_nobody(make, local_ray):
    dispatcher = make(actors([lambda: ToyRun(seconds=120), ToyRun]))
    started = time.monotonic()
    assert len(dispatcher.collect(6 * DECISIONS)) == 6
    assert time.monotonic() - started < 60
    assert dispatcher.counts["late"] == 0  # it has time yet
    stopping = time.monotonic()
    dispatcher.stop()
    assert time.monotonic() - stopping < 10


def test_a_worker_a_hundred_times_too_slow_is_replaced(make, local_ray, capfd):
    runs = [lambda: ToyRun(seconds=6.0, expected=0.06), lambda: ToyRun(seconds=0.06)]
    dispatcher = make(actors(runs), deadlines=Deadlines(factor=10, grace=1.0))
    numbers = [int(episode.id_) for episode in dispatcher.collect(6 * DECISIONS)]
    wait_until(lambda: dispatcher.counts["late"] > 0)
    numbers += [int(episode.id_) for episode in dispatcher.collect(dispatcher.ready() + 2 * DECISIONS)]
    assert {0, 1} <= set(numbers)  # its episode too
    assert dispatcher.counts["failures"] == dispatcher.counts["dropped"] == 0
    said = capfd.readouterr().err
    assert re.search(r"worker 0 lost episode [01], decision 1 \(TimeoutError: no answer in \d+ s\)", said)


def test_a_hung_worker_is_replaced(make, local_ray):
    fleet = actors([lambda: ToyRun(seconds=0.05)] * 2)
    dispatcher = make(fleet, deadlines=Deadlines(factor=10, grace=1.5))
    dispatcher.collect(2 * DECISIONS)
    hung = next(iter(fleet._actors))
    # A call beside its orders: an actor does one thing at a time, and this one stops its own process.
    fleet._actors[hung].__ray_call__.remote(lambda self: os.kill(os.getpid(), signal.SIGSTOP))
    wait_until(lambda: dispatcher.counts["late"] > 0)
    numbers = [int(episode.id_) for episode in dispatcher.collect(dispatcher.ready() + 4 * DECISIONS)]
    assert numbers == sorted(set(numbers)) or len(numbers) == len(set(numbers))
    assert set(range(2, max(numbers))) - set(numbers) <= {*dispatcher.in_flight(), 2}
    assert hung not in fleet._actors


def test_workers_join_and_leave(make, local_ray):
    wanted = [1]
    fleet = RayFleet(lambda: GrowthWorker.options(num_cpus=0.1).remote(lambda: ToyRun(seconds=0.02)), lambda: wanted[0])
    dispatcher = make(fleet)
    dispatcher.collect(DECISIONS)
    assert len(dispatcher.workers()) == 1
    wanted[0] = 2
    wait_until(lambda: [w.state for w in dispatcher.workers()] == ["training"] * 2)
    wanted[0] = 1
    local_ray.kill(fleet._actors[0])  # its node is gone, say
    dispatcher.collect(dispatcher.ready() + 2 * DECISIONS)
    assert [w.worker for w in dispatcher.workers()] == [1]


def test_a_worker_whose_process_dies_comes_back(make, local_ray):  # gone for good: see test_learner.py
    fleet = actors([lambda: ToyRun(seconds=0.02)])
    dispatcher = make(fleet)
    assert len(dispatcher.collect(DECISIONS)) == 1
    local_ray.kill(fleet._actors[0])
    wait_until(lambda: dispatcher.counts["failures"] > 0)
    numbers = [int(episode.id_) for episode in dispatcher.collect(dispatcher.ready() + 2 * DECISIONS)]
    assert numbers == list(range(1, 1 + len(numbers)))  # the one it was at is not missing
    assert list(fleet._actors) != [0]


def test_workers_that_cannot_start_are_reported_in_their_own_words(make, local_ray, monkeypatch):
    monkeypatch.setattr(fleets, "PAUSE", 0.0)
    monkeypatch.setattr(module, "GIVE_UP", 2)
    monkeypatch.setattr(module, "DEATHS", 1)

    def broken():
        raise FileNotFoundError("no corpus here")

    with pytest.raises(UserError, match="no corpus here"):
        make(actors([broken])).collect(8)


def test_stop_leaves_no_thread(make):
    dispatcher = make(threaded(ToyRun, 2))
    dispatcher.collect(8)
    dispatcher.stop()
    assert not any(thread.name == "simic-dispatcher" for thread in threading.enumerate())
