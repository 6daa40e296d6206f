"""An order gets the same answer from any worker: one that stands there, one that restores a save, one that starts anew.

Alone: `pytest tests/workers/test_worker.py`.
"""

import numpy as np
import pytest

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.errors import UserError
from esper.workers.run import GrowthRun
from esper.workers.worker import EpisodeWorker

INSTANCE = Instance(budget=1.5, data=(0.1, 0.9))


@pytest.fixture
def make(tiny_spec, tokens):
    """Makes workers over the same text."""

    def worker(saves: CheckpointStore | None = None) -> EpisodeWorker:
        return EpisodeWorker(lambda: GrowthRun(tiny_spec, tokens), saves)

    return worker


def orders(worker: EpisodeWorker, episode: int = 3) -> list[tuple[Order, Reply]]:
    """A whole episode that grows twice, order by order, with the replies."""
    done = []
    order = Order(episode, 77, INSTANCE)
    while True:
        reply = worker.advance(order)
        done.append((order, reply))
        if isinstance(reply.answer, Transition) and reply.answer.terminated:
            return done
        k = len(order.actions)
        action = int(reply.telemetry.legal()[-1]) if k in (1, 3) else 0
        order = Order(episode, 77, INSTANCE, (*order.actions, action))


def equal(one: Reply, other: Reply) -> None:
    """The same answer to the bit, whatever it took."""
    assert one.episode == other.episode
    for name, array in one.telemetry.arrays().items():
        np.testing.assert_array_equal(array, other.telemetry.arrays()[name], err_msg=name)
    assert one.telemetry.actions == other.telemetry.actions
    assert one.telemetry.sequence == other.telemetry.sequence
    assert type(one.answer) is type(other.answer)
    if isinstance(one.answer, Transition) and isinstance(other.answer, Transition):
        assert one.answer.reward == other.answer.reward
        assert one.answer.terminated == other.answer.terminated
        assert without_wall(one.answer.info) == without_wall(other.answer.info)
    assert one.expected == other.expected


def without_wall(value):
    if isinstance(value, dict):
        measured = ("wall_seconds", "validation_seconds")
        return {key: without_wall(item) for key, item in value.items() if key not in measured}
    return [without_wall(item) for item in value] if isinstance(value, list) else value


def test_every_order_gets_the_same_answer_from_any_worker(make, tmp_path):
    saves = CheckpointStore(str(tmp_path / "saves"))
    first = make(saves)
    done = []
    for order, reply in orders(make()):
        mine = first.advance(order)
        equal(mine, reply)
        saves.flush()
        for other, redone in (
            (make(), max(0, len(order.actions) - 1)),
            (make(CheckpointStore(str(tmp_path / "saves"))), 0),
        ):
            theirs = other.advance(order)
            equal(theirs, reply)
            assert theirs.redone == redone
        done.append(mine)
    assert len(done) == 9
    assert sum(reply.redone for reply in done) == 0
    assert [reply.unsaved for reply in done] == [None] * len(done)
    last = done[-1].answer
    assert isinstance(last, Transition)
    assert len(last.info["summary"]["grafts"]) == 2


def saved(make, tmp_path, n: int) -> list[tuple[Order, Reply]]:
    """A whole episode, of which a worker that is gone has done the first `n` orders, and saved each."""
    done = orders(make())
    saves = CheckpointStore(str(tmp_path))
    worker = make(saves)
    for order, _ in done[:n]:
        worker.advance(order)
    saves.flush()
    return done


def test_what_is_not_saved_is_done_again_from_the_last_save(make, tmp_path):
    done = saved(make, tmp_path, 4)
    late = make(CheckpointStore(str(tmp_path))).advance(done[6][0])
    equal(late, done[6][1])
    assert late.redone == 2  # decisions 4 and 5; the sixth was asked for


def test_a_save_of_another_way_through_the_episode_is_not_taken(make, tmp_path):
    saved(make, tmp_path, 5)
    other = Order(3, 77, INSTANCE, (0, 0, 0))  # a resumed training that chose otherwise
    reply, expected = (make(s).advance(other) for s in (CheckpointStore(str(tmp_path)), None))
    equal(reply, expected)
    assert reply.redone == 2


@pytest.mark.parametrize("actions", [(), (0, 0)])
def test_what_lies_there_of_another_training_or_spoilt_is_not_used(make, tmp_path, actions):
    """An order that starts an episode, or is not to use a save, finds one of a higher number in its place."""
    saved(make, tmp_path, 6)
    anew = Order(3, 78, None, actions, fresh=True)
    second = make(CheckpointStore(str(tmp_path)))
    reply = second.advance(anew)
    equal(reply, make().advance(anew))
    assert reply.unsaved is None
    second._saves.flush()
    found = CheckpointStore(str(tmp_path)).find("episode-000000003")
    assert found is not None
    assert found[0]["order"]["seed"] == 78


def test_an_episode_that_is_over_leaves_no_save(make, tmp_path):
    saves = CheckpointStore(str(tmp_path))
    worker = make(saves)
    orders(worker, episode=3)
    assert saves.find("episode-000000003") is not None  # its last answer may have been lost on the way
    worker.advance(Order(4, 1, None))
    saves.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["episode-000000004.safetensors"]


def test_a_full_disk_costs_nothing_but_the_save(make, tmp_path, files_of_at_most):
    done = orders(make())
    worker = make(CheckpointStore(str(tmp_path)))
    with files_of_at_most(2**10):
        replies = [worker.advance(order) for order, _ in done[:3]]
        worker._saves.flush()
        replies.append(worker.advance(done[3][0]))
    for reply, (_, expected) in zip(replies, done, strict=False):
        equal(reply, expected)
    assert "was not written" in replies[-1].unsaved
    assert str(tmp_path) in replies[-1].unsaved
    worker.advance(done[4][0])
    worker._saves.flush()
    assert worker.advance(done[5][0]).unsaved is None  # there is room again


def test_an_action_that_was_legal_once_and_is_not_when_done_again_is_no_user_error(make):
    with pytest.raises(RuntimeError, match="could not be done again: action 999 is not legal"):
        make().advance(Order(0, 0, None, (999,)))


def test_what_a_user_can_mend_is_said_as_such(tiny_spec, tokens):
    class NoText(GrowthRun):
        def reset(self, instance=None, seed=0):
            raise UserError("no text: prepare some.")

    with pytest.raises(UserError, match="no text"):
        EpisodeWorker(lambda: NoText(tiny_spec, tokens)).advance(Order(0, 0, None))
