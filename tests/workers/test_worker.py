"""An order gets the same answer from any worker: one that stands there, one that restores a run, one that starts anew.

Alone: `pytest tests/workers/test_worker.py`.
"""

import numpy as np
import pytest

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.errors import UserError
from esper.workers.run import GrowthRun
from esper.workers.worker import EpisodeWorker, save_name

INSTANCE = Instance(budget=1.5, data=(0.1, 0.9))


@pytest.fixture
def make(tiny_spec, tokens, tmp_path):
    """Makes workers over the same text, which save or do not."""

    def worker(saves: bool = False) -> EpisodeWorker:
        return EpisodeWorker(lambda: GrowthRun(tiny_spec, tokens), str(tmp_path) if saves else None)

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
    for name, array in one.telemetry.arrays().items():
        np.testing.assert_array_equal(array, other.telemetry.arrays()[name], err_msg=name)
    for what in ("episode", "expected"):
        assert getattr(one, what) == getattr(other, what)
    for what in ("actions", "sequence"):
        assert getattr(one.telemetry, what) == getattr(other.telemetry, what)
    assert type(one.answer) is type(other.answer)
    for what in ("reward", "terminated", "info"):
        assert without_wall(getattr(one.answer, what, None)) == without_wall(getattr(other.answer, what, None))


def without_wall(value):
    if isinstance(value, dict):
        measured = ("wall_seconds", "validation_seconds")
        return {key: without_wall(item) for key, item in value.items() if key not in measured}
    return [without_wall(item) for item in value] if isinstance(value, list) else value


def saved(make, n: int) -> list[tuple[Order, Reply]]:
    """A whole episode, of which a worker that is gone has done the first `n` orders, and saved each."""
    done, worker = orders(make()), make(saves=True)
    for order, _ in done[:n]:
        worker.advance(order)
    worker.store.flush()
    return done


def test_every_order_gets_the_same_answer_from_any_worker(make):
    first, done = make(saves=True), []
    for order, reply in orders(make()):
        mine = first.advance(order)
        equal(mine, reply)
        first.store.flush()
        for saves, redone in ((False, max(0, len(order.actions) - 1)), (True, 0)):
            theirs = make(saves).advance(order)
            equal(theirs, reply)
            assert theirs.redone == redone
        done.append(mine)
    assert len(done) == 9
    assert [(reply.redone, reply.unsaved) for reply in done] == [(0, None)] * len(done)
    assert len(done[-1].answer.info["summary"]["grafts"]) == 2


def test_what_is_not_saved_is_done_again_from_the_last_save(make):
    done = saved(make, 4)
    late = make(saves=True).advance(done[6][0])
    equal(late, done[6][1])
    assert late.redone == 2  # decisions 4 and 5; the sixth was asked for


@pytest.mark.parametrize(
    "other",
    [
        Order(3, 77, INSTANCE, (0, 0, 0)),  # a resumed training that chose otherwise
        Order(3, 78, None, (), fresh=True),  # another training's first order
        Order(3, 78, None, (0, 0), fresh=True),  # what a save led to was spoilt
    ],
)
def test_a_save_of_another_way_is_not_taken_but_replaced(make, tmp_path, other):
    saved(make, 6)
    worker = make(saves=True)
    reply, expected = worker.advance(other), make().advance(other)
    equal(reply, expected)
    assert reply.redone == expected.redone == max(0, len(other.actions) - 1)
    worker.store.flush()
    kept = CheckpointStore(tmp_path).find(save_name(3))[0]["order"]
    assert (kept["seed"], tuple(kept["actions"])) == (other.seed, other.actions)


def test_an_episode_that_is_over_leaves_no_save(make, tmp_path):
    worker = make(saves=True)
    orders(worker, episode=3)
    assert worker.store.find(save_name(3)) is not None  # its last answer may have been lost on the way
    worker.advance(Order(4, 1, None))
    worker.store.flush()
    assert [path.stem for path in tmp_path.iterdir()] == [save_name(4)]


def test_a_full_disk_costs_nothing_but_the_save(make, tmp_path, files_of_at_most):
    done, worker = orders(make()), make(saves=True)
    with files_of_at_most(2**10):
        replies = [worker.advance(order) for order, _ in done[:3]]
        worker.store.flush()
        replies.append(worker.advance(done[3][0]))
    for reply, (_, expected) in zip(replies, done, strict=False):
        equal(reply, expected)
    assert "was not written" in replies[-1].unsaved
    assert str(tmp_path) in replies[-1].unsaved
    worker.advance(done[4][0])
    worker.store.flush()
    assert worker.advance(done[5][0]).unsaved is None  # there is room again


def test_an_action_that_is_not_legal_when_done_again_is_no_user_error(make):
    with pytest.raises(RuntimeError, match="could not be done again: action 999 is not legal"):
        make().advance(Order(0, 0, None, (999,)))


def test_what_a_user_can_mend_is_said_as_such(tiny_spec, tokens):
    class NoText(GrowthRun):
        def reset(self, instance=None, seed=0):
            raise UserError("no text: prepare some.")

    with pytest.raises(UserError, match="no text"):
        EpisodeWorker(lambda: NoText(tiny_spec, tokens)).advance(Order(0, 0, None))
