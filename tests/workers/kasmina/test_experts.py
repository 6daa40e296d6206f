"""Experts are sparse: they skip tokens, keep to their share, and take none from each other."""

import pytest
import torch

from esper.platform.host_spec import ExpertSpec
from esper.workers.kasmina.registry import make_blueprints
from esper.workers.tolaria.model.experts import CAPACITY, Expert
from tests.workers.kasmina.growing import batch, flops, logits, small, train


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_what_no_token_chooses_is_not_computed(share):
    """Counted FLOPs follow the share down to none, to the token; at the expert's own share they are the closed form."""
    host, kasmina = small(40, make_blueprints({"expert": {"width": 12, "share": 0.25}}), n_embd=16)
    plain, formula, tokens = flops(host), host.shape.flops_per_token(), batch(host).numel()
    kasmina.graft("h0.ffn", "expert")
    expert = host.part("h0.e0")
    chosen = []
    hook = host.h[0].ln_2.register_forward_hook(lambda _, args, out: chosen.append(out.detach().flatten(0, 1)))
    logits(host)
    hook.remove()
    scores = torch.sort(chosen[0] @ expert.router[0].detach(), descending=True).values
    taken = round(share * tokens)
    expert.balance.fill_(-(scores[taken - 1] - 1e-4 if taken == tokens else scores[taken] + 1e-6))
    assert flops(host) - plain == tokens * 2 * 16 + taken * 4 * 16 * 12
    if share == 0.25:
        assert 3 * (flops(host) - plain) == (host.shape.flops_per_token() - formula) * tokens


def test_a_new_expert_takes_no_token_from_an_older_one():
    host, kasmina = small(n_embd=16)
    kasmina.graft("h0.ffn", "expert")
    train(host, kasmina, 5)
    before = logits(host)
    kasmina.graft("h0.ffn", "expert")
    assert torch.equal(logits(host), before)
    x, free = torch.randn(50, 16), torch.ones(50, dtype=torch.bool)
    taken, _ = host.part("h0.e0").eval()(x, free)
    free[taken] = False
    others, _ = host.part("h0.e1").eval()(x, free)
    assert not set(taken.tolist()) & set(others.tolist())


def test_a_gate_is_balanced_to_its_share():
    torch.manual_seed(0)
    expert = Expert(16, ExpertSpec(uid=0, width=4, share=0.3))
    torch.nn.init.normal_(expert.router, mean=0.2)  # scores that are not centred
    shares = []
    for _ in range(600):
        taken, _ = expert(torch.randn(256, 16) + 0.3, torch.ones(256, dtype=torch.bool))
        shares.append(len(taken) / 256)
    assert sum(shares[-100:]) / 100 == pytest.approx(0.3, abs=0.03)


def test_capacity_binds_in_training_only_and_keeps_the_highest_scores():
    expert = Expert(8, ExpertSpec(uid=0, width=4, share=0.25))
    torch.nn.init.normal_(expert.router)
    expert.balance.fill_(100.0)
    x, free = torch.randn(40, 8), torch.ones(40, dtype=torch.bool)
    taken, _ = expert(x, free)
    assert len(taken) == CAPACITY * 0.25 * 40
    scores = (x @ expert.router[0]).detach()
    assert scores[taken].min() >= scores[[i for i in range(40) if i not in set(taken.tolist())]].max()
    assert len(expert.eval()(x, free)[0]) == 40
