"""The dispatcher's rules (its docstring has them), on toy runs in this process and in Ray actors."""

import threading
import time
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
from esper.policies.simic.dispatcher import Dispatcher
from esper.policies.simic.fleet import LocalFleet, RayFleet
from esper.policies.simic.net import GardenerNet
from esper.workers.actor import GrowthWorker


def make_net(seed: int = 0) -> GardenerNet:
    torch.manual_seed(seed)
    net = GardenerNet(8)
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


def threaded(make_run, n: int) -> LocalFleet:
    """A fleet in this process that is served from the dispatcher's thread all the same."""
    fleet = LocalFleet(make_run, n)
    fleet.lockstep = False
    return fleet


def actors(runs) -> RayFleet:
    return RayFleet(lambda i: GrowthWorker.options(num_cpus=0.1).remote(runs[i]), len(runs))


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_whole_episodes_with_what_chose_each_action(make):
    episodes = make(LocalFleet(ToyRun, 3)).collect(100)
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
        np.testing.assert_array_equal(log_p, episode.get_extra_model_outputs(Columns.ACTION_LOGP))
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
    make(LocalFleet(Recorded, 2), seed=7, first_episode=5, instances=lambda i: chosen[i]).collect(4 * DECISIONS)
    assert seeds[:4] == [derive(7, "episode", i) for i in (5, 6, 7, 8)]
    assert instances[:4] == chosen[5:9]


def test_choices_do_not_depend_on_the_fleet(make):
    one, four = (make(LocalFleet(ToyRun, n), seed=3).collect(8 * DECISIONS) for n in (1, 4))
    other = {episode.id_: episode for episode in four}
    for episode in one:
        np.testing.assert_array_equal(episode.get_actions(), other[episode.id_].get_actions())
        np.testing.assert_array_equal(episode.get_rewards(), other[episode.id_].get_rewards())


def test_new_weights_come_between_batches_and_leave_their_number(make):
    dispatcher = make(LocalFleet(ToyRun, 3))
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


def test_unusable_telemetry_is_refused_and_counted(make):
    numbers = count()
    dispatcher = make(LocalFleet(lambda: ToyRun(break_at=3 if next(numbers) == 0 else None), 2))
    episodes = dispatcher.collect(4 * DECISIONS)
    assert all(len(episode) == DECISIONS for episode in episodes)
    assert dispatcher.counts["refused"] >= 1
    assert dispatcher.counts["failures"] == 0


def test_a_run_that_raises_loses_its_episode_only(make):
    numbers = count()
    dispatcher = make(LocalFleet(lambda: ToyRun(fail_at=2 if next(numbers) == 0 else None), 2))
    assert len(dispatcher.collect(4 * DECISIONS)) >= 4
    assert dispatcher.counts["failures"] == 1  # the run that took its place is whole


def test_gives_up_when_nothing_but_failure_happens(make):
    with pytest.raises(UserError, match=r"12 episodes in a row were lost.*RuntimeError: the toy broke"):
        make(LocalFleet(lambda: ToyRun(fail_at=2), 2)).collect(8)


def test_what_a_user_can_mend_ends_it_at_once(make):
    dispatcher = make(LocalFleet(lambda: ToyRun(fail_at=0, error=UserError("no such data: prepare it.")), 2))
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
        return dispatcher._queued() >= 5 * DECISIONS and all(seat.number is None for seat in dispatcher._seats)

    wait_until(resting)
    queued = dispatcher._queued()
    assert queued < (5 + 3) * DECISIONS
    assert queued % DECISIONS == 0
    assert sum(map(len, dispatcher.collect(20 * DECISIONS))) == 20 * DECISIONS


def test_workers_are_served_while_the_learner_is_busy(make):
    dispatcher = make(threaded(lambda: ToyRun(seconds=0.005), 2))
    dispatcher.collect(DECISIONS)
    before = dispatcher._queued()
    wait_until(lambda: dispatcher._queued() >= before + 4 * DECISIONS)  # this thread, the learner's, does nothing
    assert 0.0 < dispatcher.busy_fraction() <= 1.0


def test_a_slow_worker_holds_nobody(make, local_ray):
    dispatcher = make(actors([lambda: ToyRun(seconds=120), ToyRun]))
    started = time.monotonic()
    assert len(dispatcher.collect(6 * DECISIONS)) == 6
    assert time.monotonic() - started < 60
    stopping = time.monotonic()
    dispatcher.stop()
    assert time.monotonic() - stopping < 10


def test_a_worker_whose_process_dies_comes_back(make, local_ray):  # gone for good: see test_learner.py
    fleet = actors([lambda: ToyRun(seconds=0.02)])
    dispatcher = make(fleet)
    assert len(dispatcher.collect(DECISIONS)) == 1
    local_ray.kill(fleet._actors[0], no_restart=False)
    wait_until(lambda: dispatcher.counts["failures"] > 0)
    dispatcher.collect(max(DECISIONS, dispatcher._queued()))  # what had ended before
    episodes = dispatcher.collect(2 * DECISIONS)
    assert all(len(episode) == DECISIONS and episode.is_terminated for episode in episodes)


def test_workers_that_cannot_start_are_reported_in_their_own_words(make, local_ray, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "GIVE_UP", 2)

    def broken():
        raise FileNotFoundError("no corpus here")

    with pytest.raises(UserError, match="no corpus here"):
        make(actors([broken])).collect(8)


def test_stop_leaves_no_thread(make):
    dispatcher = make(threaded(ToyRun, 2))
    dispatcher.collect(8)
    dispatcher.stop()
    assert not any(thread.name == "simic-dispatcher" for thread in threading.enumerate())
