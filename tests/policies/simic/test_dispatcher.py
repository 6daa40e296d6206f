"""The dispatcher's rules (its docstring has them), on toy runs in this process and in Ray actors."""

import heapq
import os
import signal
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from simic_toy import DECISIONS, SPACE, ToyRun

from esper.platform.contracts import Instance
from esper.platform.errors import UserError
from esper.platform.seeding import derive
from esper.platform.spec import FleetSpec
from esper.policies.simic import dispatcher as module
from esper.policies.simic import fleet as fleets
from esper.policies.simic.dispatcher import OVERTAKING, Dispatcher, Progress
from esper.policies.simic.episode import Played
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.workers.worker import EpisodeWorker, GrowthWorker
from tests.pipelines.helpers import made_net, wait_for


@pytest.fixture
def make():
    """Make dispatchers that are stopped at the end; of a number, over so many toys in this process."""
    made = []

    def dispatcher(fleet, *, seed=0, ahead=10_000, **kwargs) -> Dispatcher:
        fleet = local(ToyRun, fleet) if isinstance(fleet, int) else fleet
        made.append(Dispatcher(fleet, made_net(), SPACE, seed=seed, ahead=ahead, **kwargs))
        return made[-1]

    yield dispatcher
    for each in made:
        each.stop()


def local(make_run, n: int, lockstep: bool = True) -> LocalFleet:
    """Workers in this process; if not in lockstep, they are served from the dispatcher's thread all the same."""
    fleet = LocalFleet(lambda: EpisodeWorker(make_run), n)
    fleet.lockstep = lockstep
    return fleet


def actors(make_run, wanted) -> RayFleet:
    return RayFleet(lambda: GrowthWorker.options(num_cpus=0.1).remote(make_run), wanted)


def numbers(episodes: list[Played]) -> list[int]:
    return [episode.number for episode in episodes]


def assert_equal(episodes: list[Played], expected: list[Played]) -> None:
    assert numbers(episodes) == numbers(expected)
    for one, other in zip(episodes, expected, strict=True):
        for name in (field.name for field in fields(Played) if field.name not in ("worked", "waited")):
            np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_whole_episodes_with_their_seeds_instances_and_what_chose_each_action(make):
    begun = []

    class Recorded(ToyRun):
        def reset(self, instance=None, seed=0):
            begun.append((seed, instance))
            return super().reset(instance, seed)

    chosen, decisions = [Instance(n_layer=1 + i) for i in range(99)], np.arange(DECISIONS)
    fleet, start = local(Recorded, 2), Progress(learned=5)
    episodes = make(fleet, seed=7, start=start, instances=lambda i: chosen[i]).collect(4 * DECISIONS)
    assert begun[:4] == [(derive(7, "episode", i), chosen[i]) for i in (5, 6, 7, 8)]
    assert [episode.instance for episode in episodes] == [chosen[i].model_dump_json() for i in (5, 6, 7, 8)]
    for episode in episodes:
        assert len(episode) == len(episode.rewards) == DECISIONS
        assert episode.terminated
        assert (episode.observations["mask"][decisions, episode.actions] == 1).all()
        log_p = torch.from_numpy(episode.logits).log_softmax(-1).numpy()[decisions, episode.actions]
        np.testing.assert_allclose(log_p, episode.log_p, rtol=1e-6)


def test_choices_do_not_depend_on_the_fleet(make):
    assert_equal(*(make(n, seed=3).collect(8 * DECISIONS) for n in (1, 4)))


def test_new_weights_come_between_batches_and_leave_their_number(make):
    dispatcher = make(3)
    assert all(set(each.weights) == {0} for each in dispatcher.collect(3 * DECISIONS))
    for _ in range(DECISIONS // 2):  # into the next episodes
        dispatcher._turn()
    dispatcher.set_weights(made_net(1).state_dict(), 1)
    second = dispatcher.collect(8 * DECISIONS)
    assert set(second[-1].weights) == {1}
    mixed = next(each for each in second if set(each.weights) == {0, 1})  # those under way go on with the new weights
    seen = {name: torch.from_numpy(array[:-1]) for name, array in mixed.observations.items()}
    for k, number in enumerate(mixed.weights):
        expected = made_net(number).logits(seen)[k].detach().numpy()
        np.testing.assert_allclose(mixed.logits[k], expected, rtol=1e-5, atol=1e-5)


class Poisoned(EpisodeWorker):
    """Spoils the answers to some orders: those of episode 1 at decision 3, `left` times."""

    left, how = 0, ""

    def advance(self, order):
        reply = super().advance(order)
        if (order.episode, len(order.actions)) == (1, 3) and Poisoned.left:
            Poisoned.left -= 1
            return POISON[Poisoned.how](reply)
        return reply


def other(reply, name, change):
    """A reply with another observation in it."""
    telemetry = replace(reply.telemetry, **{name: change(getattr(reply.telemetry, name))})
    return replace(reply, answer=replace(reply.answer, telemetry=telemetry))


POISON = {
    "not finite": lambda reply: other(reply, "globals", lambda values: values * np.nan),
    "shape": lambda reply: other(reply, "sites", lambda sites: sites[:-1]),
    "version": lambda reply: other(reply, "version", lambda version: version + 1),
    "older request": lambda reply: other(reply, "sequence", lambda sequence: 2),
    "wait is not legal": lambda reply: other(reply, "mask", lambda mask: ~mask),
    "actions without a name": lambda reply: other(reply, "actions", lambda actions: (None,) * len(actions)),
    "no actions": lambda reply: other(reply, "actions", lambda actions: ()),
    "no info": lambda reply: replace(reply, answer=replace(reply.answer, info=None)),
    "reward": lambda reply: replace(reply, answer=replace(reply.answer, reward=np.nan)),
    "no outcome": lambda reply: replace(reply, answer=reply.telemetry),
    "another episode": lambda reply: replace(reply, episode=0),
    "redone": lambda reply: replace(reply, redone="x"),
    "no reply": lambda reply: None,
}


@pytest.mark.parametrize("how", POISON)
def test_poison_is_refused_counted_and_never_learned_from(make, how, capfd):
    expected = make(2).collect(4 * DECISIONS)
    Poisoned.left, Poisoned.how = 2, how
    dispatcher = make(LocalFleet(lambda: Poisoned(ToyRun), 2))
    assert_equal(dispatcher.collect(4 * DECISIONS), expected)  # another worker did it again, to the same end
    assert Poisoned.left == 0
    counts = dispatcher.progress.counts
    assert (counts["refused"], counts["failures"], counts["dropped"]) == (2, 0, 0)
    assert "refused" in capfd.readouterr().err


def test_a_run_that_raises_is_done_again_by_another_and_at_last_dropped(make):
    runs = count()
    dispatcher = make(local(lambda: ToyRun(fail_at=2 if next(runs) == 0 else None), 2))
    assert numbers(dispatcher.collect(4 * DECISIONS)) == [0, 1, 2, 3]
    assert dispatcher.progress.counts["failures"] == 1
    assert dispatcher.progress.counts["redone"] == 2  # what the run without a save had done before
    Poisoned.left, Poisoned.how = 3, "no info"
    dispatcher = make(LocalFleet(lambda: Poisoned(ToyRun), 2))
    assert numbers(dispatcher.collect(6 * DECISIONS)) == [0, *range(2, 7)]
    assert dispatcher.progress.dropped == [1]


@pytest.mark.parametrize(
    ("run", "says", "failures"),
    [
        ({"fail_at": 2}, r"12 episodes in a row were lost.*RuntimeError: the toy broke", None),
        ({"fail_at": 0, "error": UserError("no such data: prepare it.")}, r"^no such data: prepare it\.$", 1),
    ],
)
def test_nothing_but_failure_ends_it_and_what_a_user_can_mend_at_once(make, run, says, failures):
    dispatcher = make(local(lambda: ToyRun(**run), 2))
    with pytest.raises(UserError, match=says):
        dispatcher.collect(8)
    assert failures in (None, dispatcher.progress.counts["failures"])


def test_an_error_in_the_thread_surfaces(make, monkeypatch):
    fleet = local(ToyRun, 2, lockstep=False)
    monkeypatch.setattr(fleet, "ready", lambda timeout: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(fleet).collect(8)


class Simulated(LocalFleet):
    """Workers by a clock of its own: an answer is known at once, and comes after the seconds that it takes."""

    def __init__(self, n, seconds):
        self.clock, self.worked, self._coming, self._seconds, self._number = 0.0, 0.0, [], seconds, count()
        super().__init__(lambda: EpisodeWorker(ToyRun), n)

    def submit(self, worker, order):
        seconds = self._seconds(worker, order.episode)
        self.worked += seconds
        event = self._workers[worker].advance(order)
        heapq.heappush(self._coming, (self.clock + seconds, next(self._number), worker, event))

    def ready(self, timeout):
        events, self._events = self._events, []
        if not events and self._coming:
            self.clock, _, worker, event = heapq.heappop(self._coming)
            events = [(worker, event)]
        return events


BATCH = 64


@pytest.mark.parametrize("n", [2, 64])
def test_what_is_learned_is_what_has_begun_and_no_older_than_stated(make, n):
    """Two of three episodes take three times as long: of what ends first, few would be slow."""
    slow = np.random.default_rng(0).random(10_000) < 0.67
    dispatcher = make(Simulated(n, lambda worker, episode: 3.0 if slow[episode] else 1.0), ahead=2 * BATCH)
    learned, lags = [], []
    for update in range(12):
        episodes = dispatcher.collect(BATCH)
        learned += numbers(episodes)
        lags += [update - episode.weights.min() for episode in episodes]
        dispatcher.set_weights(made_net().state_dict(), update + 1)
    assert learned == list(range(len(learned)))  # in the order of their beginning: the share is that of what has begun
    assert slow[learned].mean() == pytest.approx(0.67, abs=0.1)
    assert dispatcher.progress.learned == len(learned)
    assert max(lags) <= 1 + (2 * BATCH + (OVERTAKING + 1) * n * DECISIONS) / BATCH
    assert dispatcher.begun - len(learned) <= n + 2 * BATCH / DECISIONS + OVERTAKING * n


def test_workers_at_one_to_eight_are_kept_busy(make):
    fleet = Simulated(8, lambda worker, episode: 1.0 + worker)
    dispatcher = make(fleet, ahead=2 * BATCH)
    for _ in range(12):
        dispatcher.collect(BATCH)
    assert fleet.worked / (8 * fleet.clock) > 0.9


def test_workers_go_on_alone_rest_when_the_learner_is_behind_and_stop(make):
    dispatcher = make(local(lambda: ToyRun(seconds=0.005), 3, lockstep=False), ahead=5 * DECISIONS)
    dispatcher.collect(DECISIONS)
    wait_for(  # this thread, the learner's, does nothing
        lambda: dispatcher.ready >= 5 * DECISIONS and {each["state"] for each in dispatcher.workers()} == {"resting"}
    )
    assert dispatcher.ready < (5 + 3) * DECISIONS
    assert dispatcher.waiting == 0
    for _ in range(4):
        assert sum(map(len, dispatcher.collect(5 * DECISIONS))) == 5 * DECISIONS
    assert 0.0 < dispatcher.busy_fraction() <= 1.0


def test_deadlines_are_by_what_a_decision_usually_takes_here(make, monkeypatch):
    """They take four times what is expected; then a worker hangs at the fourth, and so does the one after it."""
    now, lost = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    class Slow(LocalFleet):
        def submit(self, worker, order):
            if len(order.actions) < 3:
                reply = self._workers[worker].advance(order)
                self._events.append((worker, replace(reply, worked=8.0)))

    fleet = Slow(lambda: EpisodeWorker(lambda: ToyRun(expected=2.0)), 1)
    dispatcher = make(fleet, limits=FleetSpec(deadline=10, grace=5))
    for _ in range(600):
        now[0] += 1.1
        dispatcher._turn()
        if dispatcher.progress.counts["late"] > len(lost):
            lost.append(now[0])
    once, again = 5 + 10 * 4 * 2, 2 * (5 + 10 * 4 * 2 * 3)  # all three again, in twice the time: it was lost once
    assert lost == pytest.approx([once, once + again], abs=10)


def test_workers_join_hang_die_and_leave(make, local_ray, monkeypatch):
    monkeypatch.setattr(fleets, "LOOK", 0.5)
    wanted = [1]
    fleet = actors(lambda: ToyRun(seconds=0.05), lambda: wanted[0])
    dispatcher = make(fleet, limits=FleetSpec(deadline=10, grace=1.5))
    counts = dispatcher.progress.counts
    dispatcher.collect(DECISIONS)
    assert len(dispatcher.workers()) == 1
    wanted[0] = 2
    wait_for(lambda: [w["state"] for w in dispatcher.workers()] == ["training"] * 2)
    # A call beside its orders: an actor does one thing at a time, and this one stops its own process.
    fleet._actors[0].__ray_call__.remote(lambda self: os.kill(os.getpid(), signal.SIGSTOP))
    wait_for(lambda: counts["late"] > 0 and {w.get("worker") for w in dispatcher.workers()} == {1, 2})
    assert counts["failures"] == 0
    wanted[0] = 1
    local_ray.kill(fleet._actors[1])  # its node is gone, say
    wait_for(lambda: counts["failures"] > 0)
    found = numbers(dispatcher.collect(dispatcher.ready + 2 * DECISIONS))
    assert found == list(range(1, 1 + len(found)))  # those that they were at are not missing
    assert counts["dropped"] == 0
    assert [w["worker"] for w in dispatcher.workers()] == [2]
    wanted[0] = 2
    wait_for(lambda: {w.get("worker") for w in dispatcher.workers()} == {2, 3})


def test_workers_that_cannot_start_are_reported_in_their_own_words(make, local_ray, monkeypatch):
    monkeypatch.setattr(fleets, "PAUSE", 0.0)
    monkeypatch.setattr(module, "GIVE_UP", 2)
    monkeypatch.setattr(module, "DEATHS", 1)

    def broken():
        raise FileNotFoundError("no corpus here")

    with pytest.raises(UserError, match="no corpus here"):
        make(actors(broken, lambda: 1)).collect(8)


@pytest.fixture
def kept(make, tmp_path):
    """Make dispatchers of three workers with a journal, which die without closing anything."""
    made = []

    def dispatcher(turns: int = 0, journal: Path | None = tmp_path, **kwargs) -> Dispatcher:
        made.append(make(3, instances=lambda number: Instance(n_layer=1 + number), journal=journal, **kwargs))
        for _ in range(turns):
            made[-1]._turn()
        return made[-1]

    yield dispatcher
    for each in made:
        if each._journal is not None:
            each._journal.close()


@pytest.mark.parametrize("turns", [1, 3 * DECISIONS + 5])
def test_a_driver_that_dies_anywhere_is_gone_on_with(kept, turns):
    kept(turns)
    assert_equal(kept().collect(9 * DECISIONS), kept(journal=None).collect(9 * DECISIONS))


def test_damage_before_the_last_line_is_told_of(kept, tmp_path):
    kept(4)
    path = tmp_path / "000000000.jsonl"
    for old, new in (('"version":5', '"version":2'), ('"observation":"', '"observation":"!!'), ("{", "[")):
        whole = path.read_text()
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=r"000000000.jsonl is damaged.*delete"):
            kept()
        path.write_text(whole)


def test_files_go_with_their_episodes_and_what_a_deleted_one_held_is_trained_again(kept, tmp_path):
    one = kept()
    for _ in range(3):
        one.collect(3 * DECISIONS)
        one._turn()
        one.forget()
        one._turn()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["000000002.jsonl", "000000003.jsonl"]
    files[0].unlink()
    again, anew = (kept(journal=journal, start=one.progress.model_copy(deep=True)) for journal in (tmp_path, None))
    assert_equal(again.collect(6 * DECISIONS), anew.collect(6 * DECISIONS))


def test_a_full_disk_is_told_of_once_and_what_was_written_is_gone_on_with(kept, tmp_path, capfd, files_of_at_most):
    one = kept(3)
    with files_of_at_most(100 + max(path.stat().st_size for path in tmp_path.iterdir())):
        for _ in range(3):
            one._turn()
    assert capfd.readouterr().err.count("cannot be written") == 1
    assert_equal(kept().collect(6 * DECISIONS), kept(journal=None).collect(6 * DECISIONS))
