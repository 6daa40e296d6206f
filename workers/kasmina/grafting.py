"""Kasmina grafts seeds onto a host in training and its optimizer, and prunes them.

In the loop, after backward: set the groups' rates, then `step` clips, runs the optimizer and ages the seeds. A seed's
values move by a fraction of the host's rate, quadratic in its age: Adam's normalised first steps move a zero matrix by
the full rate. Seeds on probation are clipped apart: together, their large first gradients would shrink the host's step.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from esper.platform.contracts import HostProtocol, check_host
from esper.platform.errors import UserError
from esper.platform.seeding import torch_stream
from esper.workers.kasmina import surgery
from esper.workers.kasmina.registry import Blueprint, Count, Natural, Planted, make_blueprints
from esper.workers.kasmina.slices import Apart, Slice, rest

NEGLIGIBLE = 1e-6  # β₂ᵗ from which on moments that began at zero are as good as the host's


@dataclass(eq=False)  # compared by identity
class Seed:
    """One graft."""

    planted: Planted
    number: Natural  # of this graft among all that were made
    parameters: Natural  # that it added
    probation: Count  # optimizer steps over which its rate warms up
    settled: Natural  # age from which on nothing sets it apart
    older: Natural = 0  # steps that the tensors which it joined had behind them
    age: Natural = 0  # optimizer steps since birth

    @property
    def site(self) -> str:
        return self.planted.site

    @property
    def blueprint(self) -> str:
        return self.planted.blueprint

    @property
    def on_probation(self) -> bool:
        return self.age < self.probation

    def scale(self, age: int) -> float:
        """Its rate over the host's in the step that makes it so old."""
        return min(1.0, age / self.probation) ** 2

    def weight(self, betas: tuple[float, float] | None) -> float:
        """What the last update of its slices was multiplied by: its scale, and what Adam's update of a slice lacked.

        Adam divides its means by 1 − βᵗ with the t of the whole tensor. At age t in a tensor of age T the update lacks
        (1 − β₁ᵀ)/(1 − β₁ᵗ)·√((1 − β₂ᵗ)/(1 − β₂ᵀ)) (Kingma & Ba 2015, 1412.6980, section 3).
        """
        t, whole = self.age, self.age + self.older
        if betas is None or t == 0:
            return self.scale(t)
        first, second = ((1 - beta**whole) / (1 - beta**t) for beta in betas)
        return self.scale(t) * first / math.sqrt(second)


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
        check_host(host)
        surgery.check_owned(optimizer, host)
        self.host = host
        self.optimizer = optimizer
        self.blueprints = dict(make_blueprints() if blueprints is None else blueprints)
        self.probation_steps = probation_steps
        self.seeds: list[Seed] = []  # on the host, oldest graft first
        self.grafts = 0  # ever made: the next one's number and random key
        self._random = seed
        self._apart: Apart | None = None  # None: to be found again

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_apart": None}  # its views are not a copy's

    def graft(self, site_id: str, blueprint_name: str) -> Seed:
        """Graft a seed; the host's output, its weights and their optimizer state do not change."""
        site, blueprint = self._sites().get(site_id), self.blueprints.get(blueprint_name)
        if site is None or blueprint is None or blueprint_name not in site.blueprints:
            sites = "; ".join(f"{other.id} takes {', '.join(other.blueprints)}" for other in self._sites().values())
            raise UserError(f"{blueprint_name!r} cannot be grafted at {site_id!r}: {sites}.")
        if not blueprint.allowed(self.host.shape, site_id):
            raise UserError(f"site {site_id!r} is at the limit that blueprint {blueprint_name!r} sets: {blueprint}.")
        surgery.check(self.optimizer)
        probation = self.probation_steps * blueprint.patience(self.host, site_id)
        part, resized, added = blueprint.graft(self.host, site_id, torch_stream(self._random, "graft", self.grafts))
        for change in resized:
            surgery.resize(self.optimizer, change)
        surgery.add(self.optimizer, added)
        older = max((self._steps(change.new) for change in resized), default=0)
        seed = Seed(
            Planted(site_id, blueprint_name, blueprint.units, part),
            number=self.grafts,
            parameters=sum(new.numel() for new, _ in added) + sum(c.new.numel() - c.old.numel() for c in resized),
            probation=probation,
            settled=max(probation, self._old_enough() if older else 0),
            older=older,
        )
        self.grafts += 1
        self.seeds.append(seed)
        self._apart = None
        return seed

    def prune(self, site_id: str) -> Seed:
        """Remove a site's newest seed, and what was grafted inside it."""
        seed = self.newest(site_id)
        resized, gone = self.blueprints[seed.blueprint].prune(self.host, seed.planted)
        for change in resized:
            surgery.resize(self.optimizer, change)
        surgery.drop(self.optimizer, gone)
        sites, part = self._sites(), self.host.part
        # Units grafted inside a pruned layer go with it; a layer grafted behind it stays.
        left = (other for other in self.seeds if other is not seed)
        self.seeds = [other for other in left if other.site in sites or part(other.planted.part)]
        self._apart = None
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

    def step(self, max_norm: float = math.inf) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After backward, with the groups' rates set: clip, step the optimizer, and age the seeds.

        Returns the host's gradient norm before clipping, and the sum of the norms of seeds on probation (None without).
        """
        apart = self._apart = self._apart or self._find_apart()
        norms = apart.clip(max_norm)
        for seed in self.seeds:
            seed.age += 1
        apart.step(self.optimizer)
        if any(seed.age in (seed.probation, seed.settled) for seed in self.seeds):
            self._apart = None
        return norms[0], norms[1:].sum() if len(norms) > 1 else None

    def slowed(self) -> list[tuple[Slice, float]]:
        """Slices whose last update was a fraction of the optimizer's, and that fraction."""
        apart = self._apart or self._find_apart()
        return [(each, weight()) for weight, slices in apart.slowed for each in slices]

    def parameters_warming_up(self) -> float:
        """Parameters on probation, each weighted by what its rate lacks: from about 1 at birth to 0."""
        return sum(seed.parameters * (1 - seed.scale(seed.age + 1)) for seed in self.seeds if seed.on_probation)

    def load(self, seeds: Sequence[Seed], grafts: int) -> None:
        """Restore copies of `seeds`, after host and optimizer; ValueError where they are not this host's."""
        sites = self._sites()
        parts = [seed.planted.part for seed in seeds if seed.planted.part]
        numbers = [seed.number for seed in seeds]
        units = Counter[str]()
        for seed in seeds:
            units[seed.site] += seed.planted.units
        if not (
            all(self._could_hold(seed.planted, sites.get(seed.site)) for seed in seeds)
            and all(units[site.id] < site.units for site in sites.values() if units[site.id])
            and len(set(parts)) == len(parts)
            and numbers == sorted(set(numbers) & set(range(grafts)))
        ):
            raise ValueError("the seeds are not this host's")
        self.seeds = [replace(seed) for seed in seeds]
        self.grafts = grafts
        self._apart = None

    def _could_hold(self, planted: Planted, site: Any) -> bool:
        blueprint = self.blueprints.get(planted.blueprint)
        if blueprint is None or blueprint.units != planted.units or bool(planted.units) == bool(planted.part):
            return False
        there = self.host.part(planted.part) if planted.part else site
        return there is not None and (site is None or blueprint.name in site.blueprints)  # a part's site may be gone

    def _find_apart(self) -> Apart:
        """The slices of seeds on probation, clipped apart, and of young ones, slowed."""
        groups = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        clipped: list[list[Slice]] = []  # newest seed first, without what belongs to seeds inside it
        taken: list[Slice] = []
        slowed, newer = [], Counter[str]()
        for seed in reversed(self.seeds):
            mine = self.blueprints[seed.blueprint].slices(self.host, seed.planted, newer[seed.site])
            newer[seed.site] += seed.planted.units
            if seed.age < seed.settled:
                by_betas: dict[Any, list[Slice]] = {}
                for each in mine:
                    betas = self._betas(each.parameter, groups) if seed.older else None
                    by_betas.setdefault(betas, []).append(each)
                slowed += [(partial(seed.weight, betas), slices) for betas, slices in by_betas.items()]
            if seed.on_probation:
                clipped.append(rest(mine, taken))
                taken += clipped[-1]
        whole = [Slice(parameter) for parameter in self.host.parameters()]
        return Apart([rest(whole, taken), *reversed(clipped)], slowed)

    def _betas(self, parameter: Any, groups: Mapping[int, dict[str, Any]]) -> tuple[float, float] | None:
        """Those by which the optimizer corrects a parameter's means, if it has any."""
        return groups[id(parameter)]["betas"] if "exp_avg_sq" in self.optimizer.state.get(parameter, {}) else None

    def _steps(self, parameter: Any) -> int:
        return int(self.optimizer.state.get(parameter, {}).get("step", 0))

    def _old_enough(self) -> int:
        """Age at which β₂ᵗ is negligible; 0 for an optimizer that has no β₂."""
        betas = [group["betas"][1] for group in self.optimizer.param_groups if "betas" in group]
        slowest = max(betas, default=0.0)
        return math.ceil(math.log(NEGLIGIBLE) / math.log(slowest)) if slowest > 0 else 0

    def _sites(self) -> dict[str, Any]:
        return {site.id: site for site in self.host.shape.injection_specs()}
