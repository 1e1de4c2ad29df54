"""What a study asks for, in order, read from its files alone: neither weights nor an environment have to be there.

The runs of contender C of study S are called `S/C`, and `S/C-s<seed>` where it, or the contender that it is a variant of, is
trained. A recipe of the study may start from weights that the study trains itself: `set: {init.file: "run:S/C-s0"}`;
trainings follow in the order that this asks for. `lacking` says what keeps it from being run on this machine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import config, envs, external, profiling, published, recipes, strict, suites
from rfbench.backbones.base import parts_of, pixel_frames
from rfbench.baselines import Prepared
from rfbench.config import Baseline, Contender, External, License, Recipe, Study, WeightsCfg
from rfbench.errors import UserError, did_you_mean
from rfbench.registry import pick
from rfbench.report import claims
from rfbench.scorers.base import SCORERS
from rfbench.settings import settings
from rfbench.suites import Suite
from rfbench.weight_files import RUN, resolve


@dataclass(frozen=True)
class Training:
    """A recipe with a seed, and the names of the trainings whose weights it starts from."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    cfg: Recipe
    after: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """What is generated, scored and timed under one name: a contender, or one training seed of it."""

    name: str
    baseline: str
    overrides: tuple[str, ...]
    suites: dict[str, Suite]  # as the study spells them
    training: str | None
    cfg: Baseline | External
    frames: dict[str, int]  # of a clip, by suite
    system: str | None  # whose printed numbers are about it, or about what it is a variant of
    timed_as: str | None  # itself, or an earlier one that differs in its weights alone: speed does not depend on them; None: not timed in turn


@dataclass(frozen=True)
class Plan:
    """The work of a study, in order."""

    name: str
    study: Study
    trainings: tuple[Training, ...]
    members: tuple[Member, ...]


def plan_of(study: str, only: Sequence[str] = (), limit: int | None = None) -> Plan:
    """Read a study and everything that it names.

    Raises:
        UserError: a missing recipe, baseline, suite, scorer, contender or metric; overrides that do not fit; clips that a
            contender cannot make; trainings that wait for each other.
    """
    found, name = config.load(Study, study), config.name_of(study)
    where = f"study '{name}'"
    contenders = {contender.name: contender for contender in found.contenders}
    if len(contenders) < len(found.contenders):
        raise UserError(f"{where} has two contenders of one name; rename one")
    for asked_for in only:
        if asked_for not in contenders:
            raise UserError(f"{where} has no contender '{asked_for}'{did_you_mean(asked_for, contenders)}")
    asked = {suite: suites.foreseen(suite, limit) for suite in found.suites}
    known = [f"{scorer}.{metric}" for scorer in found.scorers for metric in pick(SCORERS, scorer, what="scorer").metrics]
    for claim in found.claims:
        claims.check(found, claim, known)
    trained = {
        f"{name}/{contender.name}-s{seed}": (contender, seed) for contender in found.contenders if contender.recipe for seed in contender.seeds
    }

    @functools.cache
    def training(run: str) -> Training:
        return _training(run, *trained[run], trained.keys())

    chosen = [contender for contender in found.contenders if not only or contender.name in only]
    members = [member for contender in chosen for member in _members(name, contender, contenders, training, asked)]
    first: dict[str, str] = {}
    for i, member in enumerate(members):
        if isinstance(member.cfg, Baseline):
            members[i] = dataclasses.replace(member, timed_as=first.setdefault(profiling.same_speed(member.cfg), member.name))
    return Plan(name, found, tuple(_in_order(training, [member.training for member in members if member.training])), tuple(members))


def _training(name: str, contender: Contender, seed: int, of_study: Collection[str]) -> Training:
    """A training of a contender that has a recipe; `of_study` are the names of all trainings of the study."""
    assert contender.recipe is not None
    path = config.find(Recipe, contender.recipe)
    overrides = (*_overrides(contender), f"seed={seed}")
    cfg = strict.build(Recipe, strict.load_plain(path, overrides, Recipe), where=f"training {name}")
    recipes.check(cfg)
    starts = [weights.file.removeprefix(RUN) for weights in recipes.roles(cfg).values() if weights.file.startswith(RUN)]
    return Training(name, contender.recipe, overrides, cfg, tuple(run for run in starts if run in of_study))


def _members(
    study: str, contender: Contender, contenders: dict[str, Contender], training_of: Callable[[str], Training], asked: dict[str, Suite]
) -> Iterator[Member]:
    """What is run of a contender: once, or once per training seed."""
    where = f"study '{study}', contender '{contender.name}'"
    for suite in contender.suites or ():
        if suite not in asked:
            raise UserError(f"{where}: the study has no suite '{suite}'{did_you_mean(suite, asked)}")
    own = {suite: asked[suite] for suite in contender.suites or asked}
    chain = [contender]
    while (of := chain[-1].of) is not None:
        if of not in contenders or contenders[of] in chain:
            raise UserError(f"{where}: '{chain[-1].name}' is 'of' '{of}', which {'leads back to it' if of in contenders else 'is no contender'}")
        chain.append(contenders[of])
    root = chain[-1]
    overrides = tuple(text for link in reversed(chain) if link.recipe is None for text in _overrides(link))
    system = contender.system or root.system or (published.system_of(root.baseline) if root.baseline else None)
    if root.baseline is not None:
        kind: Any = External if config.is_external(root.baseline) else Baseline
        cfg: Baseline | External = config.load(kind, root.baseline, overrides)
        name = f"{study}/{contender.name}"
        yield Member(name, root.baseline, overrides, own, None, cfg, _frames(name, cfg, own), system, None)
        return
    for seed in root.seeds:
        training = training_of(f"{study}/{root.name}-s{seed}")
        path = settings().runs / "train" / training.name / "baseline.yaml"
        cfg = strict.build(Baseline, strict.load_plain(strict.as_plain(_baseline_of(training.cfg)), overrides, Baseline), where=where)
        name = f"{study}/{contender.name}-s{seed}"
        yield Member(name, str(path), overrides, own, training.name, cfg, _frames(name, cfg, own), system, None)


def _baseline_of(cfg: Recipe) -> Baseline:
    """The settings of the baseline that a training will write."""
    weights, licence = WeightsCfg(file="weights.safetensors"), License(code="", weights="")
    return Baseline(cfg.title, cfg.backbone, weights, cfg.sampler, licence, max_latents=cfg.max_latents)


def _frames(name: str, cfg: Baseline | External, asked: dict[str, Suite]) -> dict[str, int]:
    """Frames of a contender's clips, by suite.

    Raises:
        UserError: it makes none that long.
    """
    if isinstance(cfg, External):
        return {spelled: external.frames_of(cfg, suite, name) for spelled, suite in asked.items()}
    ready = Prepared(name, cfg, None)
    return {spelled: pixel_frames(ready.latents(suite.frames_at(ready.fps), f"suite '{suite.name}'")) for spelled, suite in asked.items()}


def _overrides(contender: Contender) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in contender.set.items())


def _in_order(training_of: Callable[[str], Training], wanted: Sequence[str]) -> Iterator[Training]:
    """The wanted trainings and those that they start from, each after what it needs.

    Raises:
        UserError: two of them wait for each other.
    """
    finished: dict[str, bool] = {}  # False while what it needs is looked at

    def visit(name: str) -> Iterator[Training]:
        if finished.get(name) is False:
            raise UserError(f"training '{name}' starts from weights that are trained from its own")
        if name not in finished:
            finished[name] = False
            for other in training_of(name).after:
                yield from visit(other)
            finished[name] = True
            yield training_of(name)

    for name in wanted:
        yield from visit(name)


def lacking(plan: Plan, *, fetched: bool = False) -> list[str]:
    """What a study needs and this machine does not have, a sentence each with what to do; what its own trainings make is not missing.

    With `fetched` as if all were here that comes from a repository of weights.
    """
    looks: list[Callable[[], Any]] = [functools.partial(suites.load_suite, suite) for suite in plan.study.suites]
    looks += [functools.partial(envs.python, member.cfg.env) for member in plan.members if isinstance(member.cfg, External)]
    looks += [functools.partial(resolve, one, path) for one, path in _files(plan) if not (fetched and one.repo)]
    looks += [functools.partial(_version, scorer) for scorer in plan.study.scorers]
    found: dict[str, None] = {}
    for look in looks:
        try:
            look()
        except UserError as error:
            found[str(error)] = None
    return list(found)


def _files(plan: Plan) -> Iterator[tuple[WeightsCfg, Path]]:
    """What a study reads, each once, beside the YAML file that names it; not what it makes."""
    named: list[tuple[WeightsCfg, Path]] = []
    for training in plan.trainings:
        path = config.find(Recipe, training.recipe)
        named += [(one, path) for one in recipes.files(training.cfg).values() if one.file.removeprefix(RUN) not in training.after]
    for member in plan.members:
        if isinstance(member.cfg, External):
            path = config.find(External, member.baseline)
            named += [(one, path) for one in (member.cfg.weights, *member.cfg.parts.values())]
        elif member.training is None:
            path = config.find(Baseline, member.baseline)
            named += [(one, path) for one in (member.cfg.weights, *parts_of(member.cfg.backbone, decoder=member.cfg.decoder).values())]
    yield from {(one, one.repo or path): (one, path) for one, path in named}.values()


def _version(scorer: str) -> str:
    """The version of a scorer, which is that of its weights and programs.

    Raises:
        UserError: it lacks something.
    """
    try:
        version: str = pick(SCORERS, scorer, what="scorer").version
    except ImportError as error:
        raise UserError(f"scorer '{scorer}' needs a package ({error}); run `pip install -c constraints.txt {error.name or ''}`") from None
    return version
