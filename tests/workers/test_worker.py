"""An order gets the same answer from any worker: one that stands there, that restores a run, or that starts anew."""

import pytest

from esper.platform.checkpoint import CheckpointStore
from esper.platform.contracts import Instance, Order, Reply, Transition
from esper.platform.errors import UserError
from esper.workers.run import GrowthRun
from esper.workers.worker import EpisodeWorker, save_name
from tests.workers.growing_run import plain, same_telemetry

INSTANCE = Instance(budget=1.5, data=(0.1, 0.9))


@pytest.fixture
def make(small_spec, data, tmp_path):
    def worker(saves: bool = False) -> EpisodeWorker:
        return EpisodeWorker(lambda: GrowthRun(small_spec, data), str(tmp_path) if saves else None)

    return worker


@pytest.fixture
def done(make) -> list[tuple[Order, Reply]]:
    worker, found, order = make(), [], Order(3, 77, INSTANCE)
    while True:
        reply = worker.advance(order)
        found.append((order, reply))
        if isinstance(reply.answer, Transition) and reply.answer.terminated:
            return found
        k = len(order.actions)
        action = int(reply.telemetry.legal()[-1]) if k in (1, 3) else 0
        order = Order(3, 77, INSTANCE, (*order.actions, action))


def equal(one: Reply, other: Reply) -> None:
    """The same answer to the bit, whatever it took."""
    assert (one.episode, one.expected) == (other.episode, other.expected)
    assert same_telemetry(one.telemetry, other.telemetry)
    assert one.telemetry.sequence == other.telemetry.sequence
    assert type(one.answer) is type(other.answer)
    for what in ("reward", "terminated", "info"):
        assert plain(getattr(one.answer, what, None)) == plain(getattr(other.answer, what, None))


def test_every_order_gets_the_same_answer_from_any_worker(make, done, domain):
    first, replies = make(saves=True), []
    for order, reply in done:
        replies.append(first.advance(order))
        equal(replies[-1], reply)
        first.store.flush()
        for saves, redone in ((False, max(0, len(order.actions) - 1)), (True, 0)):
            theirs = make(saves).advance(order)
            equal(theirs, reply)
            assert theirs.redone == redone
    assert [(reply.redone, reply.unsaved) for reply in replies] == [(0, None)] * 9
    summary = replies[-1].answer.info["summary"]
    assert (len(summary["grafts"]), 0 < len(summary.get("sample", "")) <= 200) == (2, domain == "text")


@pytest.fixture
def saved(make, done) -> EpisodeWorker:
    """A new worker, after one that is gone has done the first four orders, and saved each."""
    worker = make(saves=True)
    for order, _ in done[:4]:
        worker.advance(order)
    worker.store.flush()
    return make(saves=True)


def test_what_is_not_saved_is_done_again_from_the_last_save(saved, done):
    late = saved.advance(done[6][0])
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
def test_a_save_of_another_way_is_not_taken_but_replaced(make, saved, tmp_path, other):
    reply, expected = saved.advance(other), make().advance(other)
    equal(reply, expected)
    assert reply.redone == expected.redone == max(0, len(other.actions) - 1)
    saved.store.flush()
    kept = CheckpointStore(tmp_path).find(save_name(3))[0]["order"]
    assert (kept["seed"], tuple(kept["actions"])) == (other.seed, other.actions)


def test_an_episode_that_is_over_leaves_no_save(saved, done, tmp_path):
    saved.advance(done[-1][0])
    assert saved.store.find(save_name(3)) is not None  # its last answer may have been lost on the way
    saved.advance(Order(4, 1, None))
    saved.store.flush()
    assert [path.stem for path in tmp_path.iterdir()] == [save_name(4)]


def test_only_what_a_user_can_mend_is_a_user_error(make, tiny_spec, tokens):
    with pytest.raises(RuntimeError, match="could not be done again: action 999 is not legal"):
        make().advance(Order(0, 0, None, (999,)))
    budgetless = tiny_spec.overridden({"budget.amount": 0.5})
    with pytest.raises(UserError, match="set a larger budget"):
        EpisodeWorker(lambda: GrowthRun(budgetless, tokens)).advance(Order(0, 0, None))
