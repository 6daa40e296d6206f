"""The dispatcher's rules (its docstring has them), on toy runs in this process and in Ray actors."""

import heapq
import os
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

from esper.platform.contracts import Instance, Reply
from esper.platform.errors import UserError
from esper.platform.seeding import derive
from esper.policies.simic import dispatcher as module
from esper.policies.simic import fleet as fleets
from esper.policies.simic import worker_table
from esper.policies.simic.dispatcher import OVERTAKING, Dispatcher, Progress
from esper.policies.simic.episode import InFlight
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.policies.simic.net import ControllerNet
from esper.policies.simic.worker_table import Deadlines, WorkerTable
from esper.workers.worker import EpisodeWorker, GrowthWorker


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


def wait_until(condition, seconds: float = 60.0) -> None:
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
    """Spoils the answers to some orders: those of episode 1 at decision 3, `left` times."""

    left, how = 0, ""

    def advance(self, order):
        reply = super().advance(order)
        if (order.episode, len(order.actions)) == (1, 3) and Poisoned.left:
            Poisoned.left -= 1
            return POISON[Poisoned.how](reply)
        return reply


def other_telemetry(**changes):
    """A reply with another observation in it."""

    def spoil(reply):
        made = {name: change(getattr(reply.telemetry, name)) for name, change in changes.items()}
        return replace(reply, answer=replace(reply.answer, telemetry=replace(reply.telemetry, **made)))

    return spoil


def other_answer(**changes):
    return lambda reply: replace(reply, answer=replace(reply.answer, **changes))


def first(value):
    """An array whose first element is another."""

    def change(array):
        changed = array.copy()
        changed.flat[0] = value
        return changed

    return change


POISON = {
    "not finite": other_telemetry(globals=first(np.nan)),
    "shape": other_telemetry(sites=lambda sites: sites[:-1]),
    "objects": other_telemetry(globals=lambda globals: globals.astype(object)),
    "version": other_telemetry(version=lambda version: version + 1),
    "older request": other_telemetry(sequence=lambda sequence: 2),
    "wait is not legal": other_telemetry(mask=first(False)),
    "nothing is legal": other_telemetry(mask=np.zeros_like),
    "no actions": other_telemetry(actions=lambda actions: ()),
    "actions without a name": other_telemetry(actions=lambda actions: (None,) * len(actions)),
    "no arrays": other_telemetry(mask=lambda mask: None),
    "reward": other_answer(reward=np.nan),
    "no reward": other_answer(reward=None),
    "no info": other_answer(info=None),
    "no observation": other_answer(telemetry=None),
    "no outcome": lambda reply: replace(reply, answer=reply.telemetry),
    "another episode": lambda reply: replace(reply, episode=0),
    "no duration": lambda reply: replace(reply, expected=np.inf),
    "redone": lambda reply: replace(reply, redone="x"),
    "worked": lambda reply: replace(reply, worked=None),
    "no reply": lambda reply: "done",
    "nothing": lambda reply: None,
}


@pytest.mark.parametrize("how", POISON)
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
    Poisoned.left, Poisoned.how = 3, "no info"
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


class Simulated(LocalFleet):
    """Workers by a clock of its own: an answer comes after the seconds that its episode's decisions take."""

    def __init__(self, n, seconds):
        self.clock, self.worked, self._coming, self._seconds, self._number = 0.0, 0.0, [], seconds, count()
        super().__init__(local(ToyRun), n)

    def submit(self, worker, order):
        """An order's answer is known, and comes later."""
        seconds = self._seconds(worker, order.episode)
        self.worked += seconds
        event = self._workers[worker].advance(order)
        heapq.heappush(self._coming, (self.clock + seconds, next(self._number), worker, event))

    def ready(self, timeout):
        """Those that come next."""
        events, self._events = self._events, []
        if not events and self._coming:
            self.clock, _, worker, event = heapq.heappop(self._coming)
            events = [(worker, event)]
        return events


BATCH = 64


@pytest.mark.parametrize("n", [2, 64, 256])
def test_what_is_learned_is_what_has_begun_and_no_older_than_stated(make, n):
    """Two of three episodes take three times as long: of what ends first, few would be slow."""
    slow = np.random.default_rng(0).random(10_000) < 0.67
    dispatcher = make(Simulated(n, lambda worker, episode: 3.0 if slow[episode] else 1.0), ahead=2 * BATCH)
    learned, lags = [], []
    for update in range(12):
        episodes = dispatcher.collect(BATCH)
        learned += [int(episode.id_) for episode in episodes]
        lags += [update - episode.get_extra_model_outputs(WEIGHTS_SEQ_NO).min() for episode in episodes]
        dispatcher.set_weights(make_net().state_dict(), update + 1)
    assert learned == list(range(len(learned)))  # in the order of their beginning: the share is that of what has begun
    assert slow[learned].mean() == pytest.approx(0.67, abs=0.1)
    assert dispatcher.progress().learned == len(learned)
    assert max(lags) <= 1 + (2 * BATCH + (OVERTAKING + 1) * n * DECISIONS) / BATCH
    assert dispatcher.begun - len(learned) <= n + 2 * BATCH / DECISIONS + OVERTAKING * n


def test_workers_at_one_to_eight_are_kept_busy(make):
    fleet = Simulated(8, lambda worker, episode: 1.0 + worker)
    dispatcher = make(fleet, ahead=2 * BATCH)
    for _ in range(25):
        dispatcher.collect(BATCH)
    assert fleet.worked / (8 * fleet.clock) > 0.9


def test_workers_rest_when_the_learner_is_behind_and_go_on(make):
    dispatcher = make(threaded(ToyRun, 3), ahead=5 * DECISIONS)
    dispatcher.collect(DECISIONS)
    # Between two episodes a worker rests for a moment, so that alone does not tell.
    wait_until(lambda: dispatcher.ready() >= 5 * DECISIONS and all(w.state == "resting" for w in dispatcher.workers()))
    assert dispatcher.ready() < (5 + 3) * DECISIONS
    assert dispatcher.waiting() == 0
    assert sum(map(len, dispatcher.collect(20 * DECISIONS))) == 20 * DECISIONS


def test_workers_are_served_while_the_learner_is_busy(make):
    dispatcher = make(threaded(lambda: ToyRun(seconds=0.005), 2))
    dispatcher.collect(DECISIONS)
    before = dispatcher.ready()
    wait_until(lambda: dispatcher.ready() >= before + 4 * DECISIONS)  # this thread, the learner's, does nothing
    assert 0.0 < dispatcher.busy_fraction() <= 1.0
    dispatcher.stop()
    assert not any(thread.name == "simic-dispatcher" for thread in threading.enumerate())


def test_deadlines_are_by_what_a_decision_usually_takes_here(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worker_table.time, "monotonic", lambda: now[0])
    table = WorkerTable(Deadlines(factor=10, grace=5))
    for worker in (0, 1):
        table.join(worker)
        table.assign(worker, InFlight(worker, 0, None, [0] * worker, expected=2.0))
    now[0] = 24.9  # grace, and ten times two seconds
    assert table.late() == []
    now[0] = 25.1
    assert table.late() == [(0, 25.1), (1, 25.1)]
    table.answered(1, Reply(1, None, expected=2.0, worked=8.0))  # four times what the clock said
    lost = table.leave(0)
    assert lost is not None
    lost.lost["deaths"] += 1
    lost.actions += [0, 0, 0]
    table.join(2)
    table.assign(2, lost)  # by another worker, which does all three again, in twice the time: it was lost once
    assert table.next_deadline() == 1.0
    for seconds, late in ((2 * (5 + 10 * 4 * 2 * 3) - 0.1, []), (0.2, [2])):
        now[0] += seconds
        assert [worker for worker, _ in table.late()] == late


def test_a_hung_worker_is_replaced_and_its_episode_done_by_another(make, local_ray):
    fleet = actors([lambda: ToyRun(seconds=0.05)] * 2)
    dispatcher = make(fleet, deadlines=Deadlines(factor=10, grace=1.5))
    dispatcher.collect(2 * DECISIONS)
    hung = next(iter(fleet._actors))
    # A call beside its orders: an actor does one thing at a time, and this one stops its own process.
    fleet._actors[hung].__ray_call__.remote(lambda self: os.kill(os.getpid(), signal.SIGSTOP))
    wait_until(lambda: dispatcher.counts["late"] > 0)
    numbers = [int(episode.id_) for episode in dispatcher.collect(dispatcher.ready() + 4 * DECISIONS)]
    assert numbers == list(range(2, 2 + len(numbers)))
    assert dispatcher.counts["failures"] == dispatcher.counts["dropped"] == 0
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
    wait_until(lambda: dispatcher.counts["failures"] > 0)
    numbers = [int(episode.id_) for episode in dispatcher.collect(dispatcher.ready() + 2 * DECISIONS)]
    assert numbers == list(range(1, 1 + len(numbers)))  # the one that it was at is not missing
    assert [w.worker for w in dispatcher.workers()] == [1]
    wanted[0] = 2
    local_ray.kill(fleet._actors[1])
    wait_until(lambda: {w.worker for w in dispatcher.workers()} == {2, 3})  # others in its place


def test_workers_that_cannot_start_are_reported_in_their_own_words(make, local_ray, monkeypatch):
    monkeypatch.setattr(fleets, "PAUSE", 0.0)
    monkeypatch.setattr(module, "GIVE_UP", 2)
    monkeypatch.setattr(module, "DEATHS", 1)

    def broken():
        raise FileNotFoundError("no corpus here")

    with pytest.raises(UserError, match="no corpus here"):
        make(actors([broken])).collect(8)
