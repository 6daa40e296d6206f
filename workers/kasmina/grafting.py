"""Kasmina: grafts seeds onto a host in training, together with its optimizer; fuses and prunes them.

A graft adds the blueprint's tensors to the host, and to the optimizer with a learning rate that warms up from above
zero (probation). Nothing that existed is touched: no weight, no moment, no group. Once a seed's warm-up is over and its
moments are old enough, it is fused: the host is then what it would be had it been born that shape. A site's newest seed
can be pruned, fused or not.

Two things keep the updates after birth from spiking, both found by comparing with the ungrown twin on the same batches:
the warm-up is quadratic, for Adam's normalised first steps move a zero matrix by the full rate however small its
gradient; and a seed on probation is clipped by itself, for its first gradients can be so large that, clipped together,
the host's own step would shrink to nothing.

    kasmina = Kasmina(host, optimizer)
    kasmina.graft("h0.ffn", "ffn")
    for batch in batches:
        ...                                  # zero_grad, forward, backward
        for group in kasmina.host_groups:    # or leave the rate as it is
            group["lr"] = rate
        kasmina.clip(1.0)                    # instead of clip_grad_norm_
        kasmina.warm_up()                    # the seeds' rates follow the host's, scaled
        optimizer.step()
        kasmina.fuse()                       # those that are due; the output does not change
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from esper.platform.contracts import HostProtocol
from esper.platform.errors import UserError, unknown
from esper.platform.seeding import torch_stream
from esper.workers.kasmina import surgery
from esper.workers.kasmina.registry import Blueprint, Count, Natural, Planted, make_blueprints

NEGLIGIBLE = 1e-6
"""A seed is fused when β₂ᵗ is at most this: the weight of its first gradients in its second moments."""


@dataclass(eq=False)  # a seed is itself, whatever another one is like
class Seed:
    """One graft."""

    planted: Planted
    number: Natural  # of this graft among all that were made
    parameters: Natural  # that it added
    probation: Count  # optimizer steps over which its rate warms up
    fuse_age: Natural  # at which it is fused
    age: Natural = 0  # optimizer steps since birth
    # Its optimizer groups, each with the group whose rate it follows (in a saved seed their indices); none once fused.
    groups: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

    @property
    def site(self) -> str:
        """Id of the site it was grafted at."""
        return self.planted.site

    @property
    def blueprint(self) -> str:
        """Its blueprint's name."""
        return self.planted.blueprint

    @property
    def fused(self) -> bool:
        """Whether it has become the host's own."""
        return not self.groups

    @property
    def on_probation(self) -> bool:
        """Whether its rate is still warming up."""
        return self.age < self.probation

    @property
    def scale(self) -> float:
        """Its rate over the host's."""
        return min(1.0, (self.age + 1) / self.probation) ** 2


class Kasmina:
    """Grows one host and its optimizer.

    Args:
        host: the model.
        optimizer: any torch optimizer over exactly the host's parameters.
        blueprints: name → blueprint; none means every registered one with its default settings.
        probation_steps: optimizer steps over which a seed's learning rate warms up, quadratically.
        seed: of the `graft` stream.

    Attributes:
        seeds: the seeds that are there, in the order of their grafts.
        grafts: grafts ever made: the number of the next one, and the key of its random numbers.

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
        surgery.check_owns(optimizer, host.parameters())
        self.host = host
        self.optimizer = optimizer
        self.blueprints = dict(make_blueprints() if blueprints is None else blueprints)
        self.probation_steps = probation_steps
        self.seeds: list[Seed] = []
        self.grafts = 0
        self._random = seed

    # -- Growing -----------------------------------------------------------------------------------------------

    def graft(self, site_id: str, blueprint_name: str) -> Seed:
        """Graft a seed; the host's output does not change.

        Raises:
            UserError: no such site or blueprint, or the site does not take it. Nothing has been changed then.
        """
        site = self._sites().get(site_id)
        if site is None:
            raise unknown("site", site_id, self._sites())
        if blueprint_name not in self.blueprints:
            raise unknown("blueprint", blueprint_name, self.blueprints)
        if blueprint_name not in site.blueprints:
            allowed = ", ".join(site.blueprints)
            raise UserError(f"blueprint {blueprint_name!r} does not fit site {site_id!r}: it takes {allowed}.")
        blueprint = self.blueprints[blueprint_name]
        if not blueprint.allowed(self.host.shape, site_id):
            raise UserError(f"site {site_id!r} is at the limit that blueprint {blueprint_name!r} sets: {blueprint}.")

        probation = self.probation_steps * blueprint.patience(self.host, site_id)
        with torch.no_grad():
            part, pairs = blueprint.graft(self.host, site_id, torch_stream(self._random, "graft", self.grafts))
        self.host.grown()
        seed = Seed(
            Planted(site_id, blueprint_name, blueprint.units, part),
            number=self.grafts,
            parameters=sum(new.numel() for new, _ in pairs),
            probation=probation,
            fuse_age=max(probation, self._old_enough()),
            groups=surgery.add(self.optimizer, pairs),
        )
        self.grafts += 1
        self.seeds.append(seed)
        self._set_rates()
        return seed

    def fuse(self, seed: Seed | None = None) -> list[Seed]:
        """Make seeds the host's own: `seed`, or all that are old enough; returns them. Between two optimizer steps.

        The output does not change by a bit. Units are joined to the host's tensors, their moments rescaled
        (`surgery`); a part's tensors move to the groups that they followed.

        Raises:
            UserError: `seed` is not on the host, or fused already, or an older one at its site is not.
        """
        due = self.due if seed is None else [seed]
        for each in due:
            self._fuse(each)
        return due

    @property
    def due(self) -> list[Seed]:
        """The seeds that are old enough to be fused."""
        return [seed for seed in self.seeds if not seed.fused and seed.age >= seed.fuse_age]

    def prune(self, site_id: str) -> Seed:
        """Take the newest seed at a site out of host and optimizer, fused or not, with what was grafted inside it.

        Raises:
            UserError: no such site, or no seed there. Nothing has been changed then.
        """
        seed = self.newest(site_id)
        if seed is None:
            sites = self._sites()
            if site_id not in sites:
                raise unknown("site", site_id, sites)
            seeded = ", ".join(sorted({other.site for other in self.seeds} & sites.keys()))
            raise UserError(f"there is no seed at site {site_id!r} to prune: seeds are at {seeded or 'none'}.")
        swaps, gone = self.blueprints[seed.blueprint].prune(self.host, seed.planted)
        for change in swaps:
            surgery.swap(self.optimizer, change)
        surgery.drop(self.optimizer, gone)
        self.host.grown()
        sites = self._sites()
        # Seeds of units that lay in a pruned layer are gone with it; a layer grafted behind it has its own name.
        left = [other for other in self.seeds if other is not seed and (other.site in sites or self._part_lives(other))]
        self._follow_on([other for other in self.seeds if other not in left])
        self.seeds = left
        return seed

    def newest(self, site_id: str) -> Seed | None:
        """The newest seed at a site."""
        return next((seed for seed in reversed(self.seeds) if seed.site == site_id), None)

    @contextmanager
    def masked(self, site_id: str) -> Iterator[None]:
        """For the time of a `with` block, the host without the newest seed at a site: its outgoing side is zero."""
        seed = self.newest(site_id)
        assert seed is not None
        views = [view.detach() for view in self.blueprints[seed.blueprint].outgoing(self.host, seed.planted)]
        values = [view.clone() for view in views]
        try:
            for view in views:
                view.zero_()
            yield
        finally:
            for view, value in zip(views, values, strict=True):
                view.copy_(value)

    # -- At every optimizer step -------------------------------------------------------------------------------

    @property
    def host_groups(self) -> list[surgery.Group]:
        """The optimizer groups of everything that is not a seed's own: those whose rate the caller sets."""
        apart = {id(group) for seed in self.seeds for group, _ in seed.groups}
        return [group for group in self.optimizer.param_groups if id(group) not in apart]

    def warm_up(self) -> None:
        """Set the rate of every seed's groups from the groups they follow; call right before each optimizer step."""
        self._set_rates()
        for seed in self.seeds:
            seed.age += 1

    def clip(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Clip the gradient of the host, and of each seed on probation by itself.

        Returns:
            The host's norm before, and the seeds' added up (None without any): if a gradient is not finite, one of them
            is not.
        """
        young = [seed.groups for seed in self.seeds if seed.on_probation]
        apart = {id(group) for groups in young for group, _ in groups}
        seeds = [
            nn.utils.clip_grad_norm_([p for group, _ in groups for p in group["params"]], max_norm) for groups in young
        ]
        host = [p for group in self.optimizer.param_groups if id(group) not in apart for p in group["params"]]
        return nn.utils.clip_grad_norm_(host, max_norm), torch.stack(seeds).sum() if seeds else None

    def parameters_warming_up(self) -> float:
        """Parameters on probation, each counted by how far its rate still is from the host's: 1 at birth, then to 0."""
        return sum(seed.parameters * (1 - seed.scale) for seed in self.seeds if seed.on_probation)

    # -- Saving ------------------------------------------------------------------------------------------------

    def saved(self) -> list[Seed]:
        """Copies of the seeds whose groups are indices of the optimizer's."""
        index = {id(group): i for i, group in enumerate(self.optimizer.param_groups)}
        return [replace(seed, groups=[(index[id(g)], index[id(f)]) for g, f in seed.groups]) for seed in self.seeds]

    def load(self, seeds: Sequence[Seed], grafts: int) -> None:
        """Take over what `saved` gave, once host and optimizer are as they were then.

        Raises:
            UserError: the seeds are not those of this host.
        """
        groups = self.optimizer.param_groups
        pairs = [pair for seed in seeds for pair in seed.groups]
        parts = [seed.planted.part for seed in seeds if seed.planted.part]
        numbers = [seed.number for seed in seeds]
        if not (
            all(self._could_hold(seed.planted) for seed in seeds)
            and all(0 <= follows < own < len(groups) for own, follows in pairs)
            and len(dict(pairs)) == len(pairs)
            and len(set(parts)) == len(parts)
            and numbers == sorted(set(numbers))
            and all(number < grafts for number in numbers)
            and all(self._segments_are_those_of(seeds, site.id, site.units) for site in self._sites().values())
        ):
            raise UserError("the checkpoint's seeds and its host do not fit together: restore an older copy of it.")
        self.seeds = [replace(seed, groups=[(groups[i], groups[j]) for i, j in seed.groups]) for seed in seeds]
        self.grafts = grafts

    def _could_hold(self, planted: Planted) -> bool:
        blueprint, site = self.blueprints.get(planted.blueprint), self._sites().get(planted.site)
        if blueprint is None or blueprint.units != planted.units or bool(planted.units) == bool(planted.part):
            return False
        if site is None and not planted.part:  # the site of a part may be gone
            return False
        return (site is None or blueprint.name in site.blueprints) and (
            not planted.part or self.host.part(planted.part) is not None
        )

    def _segments_are_those_of(self, seeds: Sequence[Seed], site_id: str, units: int) -> bool:
        here = [seed for seed in seeds if seed.site == site_id and seed.planted.units]
        young = [seed.planted.units for seed in here if not seed.fused]
        if not units:
            return not here
        incoming, outgoing = self.host.linears(site_id)
        return sum(seed.planted.units for seed in here) < units and all(
            linear.young_sizes() == [each * features // units for each in young]
            for linear, features in ((incoming, incoming.out_features), (outgoing, outgoing.in_features))
        )

    # -- Helpers -----------------------------------------------------------------------------------------------

    def _sites(self) -> dict[str, Any]:
        return {site.id: site for site in self.host.shape.injection_specs()}

    def _set_rates(self) -> None:
        for seed in self.seeds:
            for group, follows in seed.groups:
                group["lr"] = follows["lr"] * seed.scale

    def _old_enough(self) -> int:
        """Age at which β₂ᵗ is negligible; 0 for an optimizer that has no β₂."""
        betas = [group["betas"][1] for group in self.optimizer.param_groups if "betas" in group]
        slowest = max(betas, default=0.0)
        return math.ceil(math.log(NEGLIGIBLE) / math.log(slowest)) if slowest > 0 else 0

    def _fuse(self, seed: Seed) -> None:
        if seed not in self.seeds:
            raise UserError(f"the seed at {seed.site!r} is not on this host: fuse one of kasmina.seeds.")
        young = [each for each in self.seeds if each.site == seed.site and each.planted.units and not each.fused]
        if seed.fused or (seed.planted.units and young[0] is not seed):
            raise UserError(f"the seed at {seed.site!r} is fused already, or an older one there comes first.")
        for change in self.blueprints[seed.blueprint].fuse(self.host, seed.planted):
            surgery.swap(self.optimizer, change)
        for group, follows in seed.groups:
            if group["params"]:
                surgery.move(self.optimizer, group, follows)
        self._follow_on([seed])
        seed.groups = []

    def _follow_on(self, leaving: list[Seed]) -> None:
        """Let what follows the groups of seeds that lose theirs follow what those followed."""
        ahead = {id(group): follows for seed in leaving for group, follows in seed.groups}

        def still(group: surgery.Group) -> surgery.Group:
            while id(group) in ahead:
                group = ahead[id(group)]
            return group

        for seed in self.seeds:
            seed.groups = [(group, still(follows)) for group, follows in seed.groups]

    def _part_lives(self, seed: Seed) -> bool:
        return bool(seed.planted.part) and self.host.part(seed.planted.part) is not None
