"""`rfbench reproduce`: a whole study: train, generate, score, time, report, each where it is not done yet.

Everything that can be checked is checked before anything is run. The runs of contender C of study S are called `S/C`, and
`S/C-s<seed>` where it, or the contender that it is a variant of, is trained. A recipe of the study may start from weights
that the study trains itself: `set: {init.file: "run:S/C-s0"}`; trainings follow in the order that this asks for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rfbench import baselines, config, evaluate, generate, profiling, recipes, records, report, strict, suites, train
from rfbench.baselines import Prepared
from rfbench.config import Baseline, Contender, License, ProfileCfg, Recipe, Study, WeightsCfg
from rfbench.errors import UserError, did_you_mean
from rfbench.progress import say
from rfbench.registry import pick
from rfbench.report import claims
from rfbench.scorers.base import SCORERS
from rfbench.settings import settings
from rfbench.suites import Suite
from rfbench.weights import RUN, resolve


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
    cfg: Baseline
    timed_as: str  # itself, or an earlier one from which it differs in its weights alone: speed does not depend on them


@dataclass(frozen=True)
class Plan:
    """The work of a study, in order."""

    name: str
    study: Study
    trainings: tuple[Training, ...]
    members: tuple[Member, ...]


def reproduce(
    study: str, *, only: Sequence[str] = (), limit: int | None = None, dry_run: bool = False, fresh: bool = False, out: Path | None = None
) -> Path:
    """Run what is missing of a study and write its report into `out`, else into a folder of the study's name in the reports folder.

    `only` names contenders, `limit` keeps the first prompts of every suite. `fresh` starts the chosen contenders over;
    trainings of others whose weights they need stay.

    Returns:
        the report's page.

    Raises:
        UserError: something that the study names is missing or does not fit, before any work; whatever the verbs refuse.
    """
    plan = plan_of(study, only, limit)
    out = out or settings().reports / plan.name
    show(plan)
    if dry_run:
        return out / "index.html"
    chosen = {member.training for member in plan.members}
    for training in plan.trainings:
        train.train(training.recipe, training.overrides, name=training.name, fresh=fresh and training.name in chosen)
    for member in plan.members:
        for suite in member.suites:
            run = generate.generate(member.baseline, suite, member.overrides, name=member.name, limit=limit, fresh=fresh)
            evaluate.evaluate(run, plan.study.scorers)
    if plan.study.profile is not None and not only:
        _time(plan, plan.study.profile, fresh)
    elif plan.study.profile is not None:
        say("timing is left out: contenders are timed in turn, all of them together, which --only prevents")
    page = report.report([], study=study, out=out, record=True)
    show(plan)
    return page


def _time(plan: Plan, asked: ProfileCfg, fresh: bool) -> None:
    """All contenders of a study in turn, in one run."""
    ready = [baselines.prepare(member.baseline, member.overrides, name=member.name) for member in plan.members if member.timed_as == member.name]
    stand_ins = {member.name: member.timed_as for member in plan.members if member.timed_as != member.name}
    profiling.in_turn(plan.name, ready, timed_as=stand_ins, fresh=fresh, chunks=asked.chunks, repeats=asked.repeats, processes=asked.processes)


def plan_of(study: str, only: Sequence[str] = (), limit: int | None = None) -> Plan:
    """Read a study and everything that it names.

    Raises:
        UserError: a missing recipe, baseline, weights, suite, scorer, contender or metric; overrides that do not fit; clips
            that a contender cannot make; trainings that wait for each other.
    """
    found, name = config.load(Study, study), config.name_of(study)
    where = f"study '{name}'"
    contenders = {contender.name: contender for contender in found.contenders}
    if len(contenders) < len(found.contenders):
        raise UserError(f"{where} has two contenders of one name; rename one")
    for asked_for in only:
        if asked_for not in contenders:
            raise UserError(f"{where} has no contender '{asked_for}'{did_you_mean(asked_for, contenders)}")
    asked = {suite: suites.load_suite(suite, limit) for suite in found.suites}
    known = [f"{scorer}.{metric}" for scorer in found.scorers for metric in pick(SCORERS, scorer, what="scorer").metrics]
    for claim in found.claims:
        claims.check(found, claim, known)
    recipes = {
        f"{name}/{contender.name}-s{seed}": (contender, seed) for contender in found.contenders if contender.recipe for seed in contender.seeds
    }

    @functools.cache
    def training(run: str) -> Training:
        return _training(run, *recipes[run], recipes.keys())

    chosen = [contender for contender in found.contenders if not only or contender.name in only]
    members = [member for contender in chosen for member in _members(name, contender, contenders, training, asked)]
    first: dict[str, str] = {}
    members = [dataclasses.replace(member, timed_as=first.setdefault(profiling.same_speed(member.cfg), member.name)) for member in members]
    return Plan(name, found, tuple(_in_order(training, [member.training for member in members if member.training])), tuple(members))


def _training(name: str, contender: Contender, seed: int, of_study: Collection[str]) -> Training:
    """A training of a contender that has a recipe; `of_study` are the names of all trainings of the study."""
    assert contender.recipe is not None
    path = config.find(Recipe, contender.recipe)
    overrides = (*_overrides(contender), f"seed={seed}")
    cfg = strict.build(Recipe, strict.load_plain(path, overrides, Recipe), where=f"training {name}")
    recipes.check(cfg)
    after = []
    for weights in recipes.roles(cfg).values():
        run = weights.file.removeprefix(RUN)
        if run in of_study and run != weights.file:
            after.append(run)
        else:
            resolve(weights, path)
    return Training(name, contender.recipe, overrides, cfg, tuple(after))


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
    if root.baseline is not None:
        cfg = baselines.prepare(root.baseline, overrides).cfg
        member = f"{study}/{contender.name}"
        yield _checked(Member(member, root.baseline, overrides, own, None, cfg, member))
        return
    for seed in root.seeds:
        training = training_of(f"{study}/{root.name}-s{seed}")
        path = settings().runs / "train" / training.name / "baseline.yaml"
        cfg = strict.build(Baseline, strict.load_plain(strict.as_plain(_baseline_of(training.cfg)), overrides, Baseline), where=where)
        name = f"{study}/{contender.name}-s{seed}"
        yield _checked(Member(name, str(path), overrides, own, training.name, cfg, name))


def _baseline_of(cfg: Recipe) -> Baseline:
    """The settings of the baseline that a training will write."""
    weights, licence = WeightsCfg(file="weights.safetensors"), License(code="", weights="")
    return Baseline(cfg.title, cfg.backbone, weights, cfg.sampler, licence, max_latents=cfg.max_latents)


def _checked(member: Member) -> Member:
    """The same, if it can make clips as long as its suites ask for."""
    for suite in member.suites.values():
        ready = Prepared(member.name, member.cfg, None)
        ready.latents(suite.frames_at(ready.fps), f"suite '{suite.name}'")
    return member


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


def show(plan: Plan) -> None:
    """A table on stderr of what is there of a study and what is not."""
    from rich.console import Console
    from rich.table import Table

    folder, study = settings().runs, plan.study
    table = Table(title=f"study {plan.name}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("", "train", *study.suites, *(["profile"] if study.profile else [])):
        table.add_column(column)
    for training in plan.trainings:
        if training.name not in {member.training for member in plan.members}:
            table.add_row(training.name, _trained(folder / "train" / training.name, training))
    trainings = {training.name: training for training in plan.trainings}
    profiles = [records.read_run(path.parent).status for path in (folder / "profile" / plan.name).glob("*/run.json")]
    timed = "done" if records.DONE in profiles else "to do"
    for member in plan.members:
        cells = [_trained(folder / "train" / member.training, trainings[member.training]) if member.training else ""]
        for suite in study.suites:
            asked = member.suites.get(suite)
            cells.append(_clips(folder / "bench" / member.name / asked.name, asked, study.scorers) if asked else "")
        if study.profile:
            cells.append(timed if member.timed_as == member.name else f"as {member.timed_as.rpartition('/')[2]}")
        table.add_row(member.name, *cells)
    Console(stderr=True).print(table)


def _trained(directory: Path, training: Training) -> str:
    if not (directory / "run.json").exists():
        return f"to do: {training.cfg.steps} steps"
    status = records.read_run(directory).status
    return "done" if status == records.DONE else f"{status}, {training.cfg.steps} steps"


def _clips(directory: Path, asked: Suite, scorers: Sequence[str]) -> str:
    there, wanted = len(records.read_clips(directory)), len(asked.items)
    if there < wanted:
        return f"{there} of {wanted} clips"
    scored = sum((directory / "scores" / f"{scorer}.json").exists() for scorer in scorers)
    return "done" if scored == len(scorers) else f"{there} clips, {scored} of {len(scorers)} scorers"
