"""Kasmina grafts seeds onto a host in training and its optimizer, fuses them and prunes them.

Each optimizer step: backward, set the rates of `host_groups`, `clip`, `warm_up`, `optimizer.step`, `fuse`.
The warm-up is quadratic: Adam's normalised first steps move a zero matrix by the full rate. Seeds on probation are
clipped apart: clipped together, their large first gradients would shrink the host's step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from esper.platform.contracts import HostProtocol
from esper.platform.errors import UserError
from esper.platform.seeding import torch_stream
from esper.workers.kasmina import surgery
from esper.workers.kasmina.registry import Blueprint, Count, Natural, Planted, make_blueprints

NEGLIGIBLE = 1e-6  # largest β₂ᵗ at fusion: the weight of a seed's first gradients in its second moments


@dataclass(eq=False)  # compared by identity
class Seed:
    """One graft."""

    planted: Planted
    number: Natural  # of this graft among all that were made
    parameters: Natural  # that it added
    probation: Count  # optimizer steps over which its rate warms up
    fuse_age: Natural  # at which it is fused
    age: Natural = 0  # optimizer steps since birth
    # (own optimizer group, the group whose rate it follows), as indices in a saved seed; empty once fused.
    groups: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

    @property
    def site(self) -> str:
        return self.planted.site

    @property
    def blueprint(self) -> str:
        return self.planted.blueprint

    @property
    def fused(self) -> bool:
        return not self.groups

    @property
    def on_probation(self) -> bool:
        return self.age < self.probation

    @property
    def scale(self) -> float:
        return min(1.0, (self.age + 1) / self.probation) ** 2


class Kasmina:
    """Grows one host and its optimizer, which must hold exactly the host's parameters."""

    def __init__(
        self,
        host: HostProtocol,
        optimizer: torch.optim.Optimizer,
        *,
        blueprints: Mapping[str, Blueprint] | None = None,  # None: all registered ones with default settings
        probation_steps: int = 200,  # optimizer steps of a seed's warm-up, times its blueprint's patience
        seed: int = 0,  # of the `graft` stream
    ) -> None:
        self.host = host
        self.optimizer = optimizer
        self.blueprints = dict(make_blueprints() if blueprints is None else blueprints)
        self.probation_steps = probation_steps
        self.seeds: list[Seed] = []  # on the host, oldest graft first
        self.grafts = 0  # ever made: the next one's number and random key
        self._random = seed

    def graft(self, site_id: str, blueprint_name: str) -> Seed:
        """Graft a seed; the host's output, its weights and their optimizer state do not change."""
        site, blueprint = self._sites().get(site_id), self.blueprints.get(blueprint_name)
        if site is None or blueprint is None or blueprint_name not in site.blueprints:
            sites = "; ".join(f"{other.id} takes {', '.join(other.blueprints)}" for other in self._sites().values())
            raise UserError(f"{blueprint_name!r} cannot be grafted at {site_id!r}: {sites}.")
        if not blueprint.allowed(self.host.shape, site_id):
            raise UserError(f"site {site_id!r} is at the limit that blueprint {blueprint_name!r} sets: {blueprint}.")
        probation = self.probation_steps * blueprint.patience(self.host, site_id)
        with torch.no_grad():
            part, pairs = blueprint.graft(self.host, site_id, torch_stream(self._random, "graft", self.grafts))
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
        """Make `seed`, or all that are due, the host's own, between two optimizer steps; returns them.

        The output does not change by a bit. Units join the host's tensors with rescaled moments (`surgery`); a part's
        tensors move to the groups they followed.
        """
        due = self.due if seed is None else [seed]
        for each in due:
            young = [s for s in self.seeds if s.site == each.site and s.planted.units and not s.fused]
            if each.fused or each not in self.seeds or (each.planted.units and young[0] is not each):
                raise UserError(f"the seed at {each.site!r} is gone, fused, or younger than another: fuse the oldest.")
            for change in self.blueprints[each.blueprint].fuse(self.host, each.planted):
                surgery.swap(self.optimizer, change)
            for group, follows in each.groups:
                if group["params"]:
                    surgery.move(self.optimizer, group, follows)
            self._follow_on([each])
            each.groups = []
        return due

    @property
    def due(self) -> list[Seed]:
        return [seed for seed in self.seeds if not seed.fused and seed.age >= seed.fuse_age]

    def prune(self, site_id: str) -> Seed:
        """Remove a site's newest seed, fused or not, and what was grafted inside it."""
        seed = self.newest(site_id)
        swaps, gone = self.blueprints[seed.blueprint].prune(self.host, seed.planted)
        for change in swaps:
            surgery.swap(self.optimizer, change)
        surgery.drop(self.optimizer, gone)
        sites, part = self._sites(), self.host.part
        # Units grafted inside a pruned layer go with it; a layer grafted behind it stays.
        left = [
            other for other in self.seeds if other is not seed and (other.site in sites or part(other.planted.part))
        ]
        self._follow_on([other for other in self.seeds if other not in left])
        self.seeds = left
        return seed

    def newest(self, site_id: str) -> Seed:
        found = next((seed for seed in reversed(self.seeds) if seed.site == site_id), None)
        if found is None:
            raise UserError(f"there is no seed at site {site_id!r}.")
        return found

    @contextmanager
    def masked(self, site_id: str) -> Iterator[None]:
        """Zero the outgoing side of a site's newest seed inside a `with` block."""
        seed = self.newest(site_id)
        views = [view.detach() for view in self.blueprints[seed.blueprint].outgoing(self.host, seed.planted)]
        values = [view.clone() for view in views]
        try:
            for view in views:
                view.zero_()
            yield
        finally:
            for view, value in zip(views, values, strict=True):
                view.copy_(value)

    @property
    def host_groups(self) -> list[surgery.Group]:
        """The optimizer groups whose rate the caller sets: all but the unfused seeds' own."""
        apart = {id(group) for seed in self.seeds for group, _ in seed.groups}
        return [group for group in self.optimizer.param_groups if id(group) not in apart]

    def warm_up(self) -> None:
        """Set the seeds' rates from the groups they follow; call right before each optimizer step."""
        self._set_rates()
        for seed in self.seeds:
            seed.age += 1

    def clip(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Clip the host and each seed on probation apart; returns the host's norm and the seeds' sum (None without)."""
        young = [[group for group, _ in seed.groups] for seed in self.seeds if seed.on_probation]
        apart = {id(group) for groups in young for group in groups}
        seeds = [nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], max_norm) for groups in young]
        host = [p for group in self.optimizer.param_groups if id(group) not in apart for p in group["params"]]
        return nn.utils.clip_grad_norm_(host, max_norm), torch.stack(seeds).sum() if seeds else None

    def parameters_warming_up(self) -> float:
        """Parameters on probation, each weighted by 1 − scale: from about 1 at birth to 0."""
        return sum(seed.parameters * (1 - seed.scale) for seed in self.seeds if seed.on_probation)

    def saved(self) -> list[Seed]:
        """Copies of the seeds with their groups as indices into the optimizer's."""
        index = {id(group): i for i, group in enumerate(self.optimizer.param_groups)}
        return [replace(seed, groups=[(index[id(g)], index[id(f)]) for g, f in seed.groups]) for seed in self.seeds]

    def load(self, seeds: Sequence[Seed], grafts: int) -> None:
        """Restore what `saved` gave, after host and optimizer; ValueError where the seeds are not this host's."""
        groups, sites = self.optimizer.param_groups, self._sites()
        pairs = [pair for seed in seeds for pair in seed.groups]
        parts = [seed.planted.part for seed in seeds if seed.planted.part]
        numbers = [seed.number for seed in seeds]
        if not (
            all(self._could_hold(seed.planted, sites.get(seed.site)) for seed in seeds)
            and all(self._segments_are_those_of(seeds, site) for site in sites.values() if site.units)
            and all(0 <= follows < own < len(groups) for own, follows in pairs)
            and len(dict(pairs)) == len(pairs)
            and len(set(parts)) == len(parts)
            and numbers == sorted(set(numbers) & set(range(grafts)))
        ):
            raise ValueError("the seeds are not this host's")
        self.seeds = [replace(seed, groups=[(groups[i], groups[j]) for i, j in seed.groups]) for seed in seeds]
        self.grafts = grafts

    def _could_hold(self, planted: Planted, site: Any) -> bool:
        blueprint = self.blueprints.get(planted.blueprint)
        if blueprint is None or blueprint.units != planted.units or bool(planted.units) == bool(planted.part):
            return False
        there = self.host.part(planted.part) if planted.part else site
        return there is not None and (site is None or blueprint.name in site.blueprints)  # a part's site may be gone

    def _segments_are_those_of(self, seeds: Sequence[Seed], site: Any) -> bool:
        here = [seed for seed in seeds if seed.site == site.id and seed.planted.units]
        young = [seed.planted.units for seed in here if not seed.fused]
        incoming, outgoing = self.host.linears(site.id)
        return sum(seed.planted.units for seed in here) < site.units and all(
            linear.young_sizes() == [each * features // site.units for each in young]
            for linear, features in ((incoming, incoming.out_features), (outgoing, outgoing.in_features))
        )

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

    def _follow_on(self, leaving: list[Seed]) -> None:
        """Redirect groups that follow a leaving seed's group to the group it followed."""
        ahead = {id(group): follows for seed in leaving for group, follows in seed.groups}
        for seed in self.seeds:
            for i, (group, follows) in enumerate(seed.groups):
                while id(follows) in ahead:
                    follows = ahead[id(follows)]
                seed.groups[i] = group, follows
