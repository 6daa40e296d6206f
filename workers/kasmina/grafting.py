"""Kasmina: grafts seeds onto a host in training, together with its optimizer.

A graft adds the blueprint's tensors to the host and optimizer groups for them: zero moments, a step count of their
own, the settings of the group their sibling is in, and a learning rate that warms up from above zero (probation).
Nothing that existed is touched: no weight, no moment, no group.

Two things keep the updates after birth from spiking, both found by comparing with the ungrown twin on the same batches:
the warm-up is quadratic, for Adam's normalised first steps move a zero matrix by the full rate however small its
gradient; and a seed on probation is clipped by itself, for its first gradients can be so large that, clipped together,
the host's own step would shrink to nothing.

    kasmina = Kasmina(host, optimizer)
    kasmina.graft("h0.ffn", "ffn")
    for batch in batches:
        ...                      # backward, and your scheduler, which sets the host's groups
        kasmina.clip(1.0)        # instead of clip_grad_norm_
        kasmina.warm_up()        # the seeds' rates follow the host's, scaled
        optimizer.step()
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from esper.platform.contracts import HostProtocol
from esper.platform.errors import UserError, unknown
from esper.platform.seeding import torch_stream
from esper.workers.kasmina.registry import Blueprint, make_blueprints


@dataclass
class Seed:
    """One graft.

    Attributes:
        site: id of the site it was grafted at.
        blueprint: its name.
        groups: index of each of its optimizer groups → index of the group it follows.
        parameters: how many it added.
        age: optimizer steps since birth.
    """

    site: str
    blueprint: str
    groups: dict[int, int]
    parameters: int
    age: int = 0


class Kasmina:
    """Growth of one host and its optimizer.

    Args:
        host: the model.
        optimizer: owns exactly the host's parameters, each once.
        blueprints: name → blueprint; none means every registered one with its defaults.
        probation_steps: optimizer steps over which a seed's rate warms up.
        seed: of the streams that new weights are drawn from.

    Raises:
        UserError: the optimizer does not hold exactly the host's parameters.
    """

    def __init__(
        self,
        host: HostProtocol,
        optimizer: torch.optim.Optimizer,
        *,
        blueprints: Mapping[str, Blueprint] | None = None,
        probation_steps: int = 200,
        seed: int = 0,
    ) -> None:
        owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if set(owned) != {id(parameter) for parameter in host.parameters()}:
            raise UserError(
                "the optimizer does not hold exactly the host's parameters: make it from host.parameters()."
            )
        self.host = host
        self.optimizer = optimizer
        self.blueprints = dict(make_blueprints() if blueprints is None else blueprints)
        self.probation_steps = probation_steps
        self.seeds: list[Seed] = []
        self._random = seed

    def graft(self, site_id: str, blueprint_name: str) -> Seed:
        """Graft a seed; the host's output does not change.

        Raises:
            UserError: no such site or blueprint, or the site does not take it. Nothing has been changed then.
        """
        sites = {site.id: site for site in self.host.injection_specs()}
        if site_id not in sites:
            raise unknown("site", site_id, sites)
        if blueprint_name not in self.blueprints:
            raise unknown("blueprint", blueprint_name, self.blueprints)
        if blueprint_name not in sites[site_id].blueprints:
            allowed = ", ".join(sites[site_id].blueprints)
            raise UserError(f"blueprint {blueprint_name!r} does not fit site {site_id!r}: it takes {allowed}.")
        blueprint = self.blueprints[blueprint_name]
        if not blueprint.allowed(self.host.shape, site_id):
            raise UserError(f"site {site_id!r} is at the limit that blueprint {blueprint_name!r} sets: {blueprint}.")

        generator = torch_stream(self._random, "graft", len(self.seeds))
        with torch.no_grad():
            pairs = blueprint.graft(self.host, site_id, generator)
        self.host.grown()
        added = sum(new.numel() for new, _ in pairs)
        seed = Seed(site_id, blueprint_name, self._add_groups(pairs), added)
        self.seeds.append(seed)
        self.warm_up(advance=False)
        return seed

    def warm_up(self, *, advance: bool = True) -> None:
        """Set the rate of every seed's groups from the groups they follow; call right before each optimizer step."""
        groups = self.optimizer.param_groups
        for seed in self.seeds:
            scale = self._scale(seed)
            for group, follows in seed.groups.items():
                groups[group]["lr"] = groups[follows]["lr"] * scale
            seed.age += advance

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradient of the host, and of each seed on probation by itself; returns the host's norm before."""
        groups = self.optimizer.param_groups
        young = [seed for seed in self.seeds if self.on_probation(seed)]
        apart = {group for seed in young for group in seed.groups}
        for seed in young:
            nn.utils.clip_grad_norm_([p for group in seed.groups for p in groups[group]["params"]], max_norm)
        host = [p for i, group in enumerate(groups) if i not in apart for p in group["params"]]
        return nn.utils.clip_grad_norm_(host, max_norm)

    def parameters_warming_up(self) -> float:
        """Parameters on probation, each counted by how far its rate still is from the host's: 1 at birth, then to 0."""
        return sum(seed.parameters * (1 - self._scale(seed)) for seed in self.seeds if self.on_probation(seed))

    def _scale(self, seed: Seed) -> float:
        return min(1.0, (seed.age + 1) / self.probation_steps) ** 2

    def on_probation(self, seed: Seed) -> bool:
        """Whether the seed's rate is still warming up."""
        return seed.age < self.probation_steps

    def _add_groups(self, pairs: list[tuple]) -> dict[int, int]:
        """A new group for each group that the siblings are in, with its settings; new index → followed index."""
        groups = self.optimizer.param_groups
        home = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
        by_group: dict[int, list] = {}
        for new, sibling in pairs:
            by_group.setdefault(home[id(sibling)], []).append(new)
        added = {}
        for follows, parameters in by_group.items():
            settings = {key: value for key, value in groups[follows].items() if key != "params"}
            self.optimizer.add_param_group({**settings, "params": parameters})
            added[len(groups) - 1] = follows
        return added
