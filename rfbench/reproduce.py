"""`rfbench reproduce`: a whole study: train, generate, score, time, report, each where it is not done yet.

Everything that can be checked is checked before anything is run. `rfbench.studies` says what is run, and what it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfbench import baselines, budget, evaluate, generate, hardware, profiling, provenance, records, report, studies, train
from rfbench.config import Baseline, ProfileCfg
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.settings import settings
from rfbench.studies import Member, Plan, Training
from rfbench.suites import Suite


def reproduce(study: str, *, only: Sequence[str] = (), limit: int | None = None, fresh: bool = False, out: Path | None = None) -> Path:
    """Run what is missing of a study and write its report into `out`, else into a folder of the study's name in the reports folder.

    `only` names contenders, `limit` keeps the first prompts of every suite. `fresh` starts the chosen contenders over;
    trainings of others whose weights they need stay.

    Returns:
        the report's page.

    Raises:
        UserError: something that the study names is missing or does not fit, before any work; whatever the verbs refuse.
    """
    plan = studies.plan_of(study, only, limit)
    out = out or settings().reports / plan.name
    records.refuse_unwritable(out / "index.html", f"--out {out}")
    show(plan)
    for sentence in studies.lacking(plan):
        raise UserError(sentence)
    if plan.study.profile is not None and not only and not fresh:
        _refuse_other_settings(plan)
    failed: list[str] = []
    chosen = {member.training for member in plan.members}
    for training in plan.trainings:
        train.train(training.recipe, training.overrides, name=training.name, fresh=fresh and training.name in chosen)
    for member in plan.members:
        for suite in member.suites:
            failed += _make(member, suite, plan.study.scorers, limit, fresh)
    if plan.study.profile is not None and not only:
        _time(plan, plan.study.profile, fresh)
    elif plan.study.profile is not None:
        say("timing is left out: contenders are timed in turn, all of them together, which --only prevents")
    page = report.report([], study=study, out=out, record=True)
    show(plan)
    if failed:
        raise UserError(f"{page} is written without what failed: {'; '.join(failed)}", code=1)
    return page


def foresee(study: str, only: Sequence[str] = (), limit: int | None = None, gpus: int = 1) -> dict[str, Any]:
    """Say what is there of a study and what the rest takes on `gpus` devices; nothing is run and nothing has to be there.

    Raises:
        UserError: what the study names does not exist or does not fit.
    """
    plan = studies.plan_of(study, only, limit)
    found = budget.estimate(plan, gpus)
    show(plan)
    budget.show(found)
    return found.document()


def _make(member: Member, suite: str, scorers: Sequence[str], limit: int | None, fresh: bool) -> list[str]:
    """Clips of a contender and their scores. What its authors' code failed at is returned and does not keep the others from their turn."""
    try:
        run = generate.generate(member.baseline, suite, member.overrides, name=member.name, limit=limit, fresh=fresh)
    except UserError as error:
        if isinstance(member.cfg, Baseline) or error.code != 1:
            raise
        say(f"{member.name} on {suite}: {error}")
        return [str(error)]
    evaluate.evaluate(run, scorers)
    return []


def _time(plan: Plan, asked: ProfileCfg, fresh: bool) -> None:
    """All contenders of a study in turn, in one run."""
    ready = [baselines.prepare(member.baseline, member.overrides, name=member.name) for member in plan.members if member.timed_as == member.name]
    stand_ins = {member.name: member.timed_as for member in plan.members if member.timed_as not in (None, member.name)}
    profiling.in_turn(plan.name, ready, timed_as=stand_ins, fresh=fresh, chunks=asked.chunks, repeats=asked.repeats, processes=asked.processes)


def _refuse_other_settings(plan: Plan) -> None:
    """
    Raises:
        UserError: the study's contenders were timed here by other settings of the machine, with what to do that leaves all else as it is.
    """
    directory = settings().runs / "profile" / plan.name / hardware.name(baselines.device())
    if (directory / "run.json").exists():
        then = records.read_run(directory).inputs.get("settings", {})
        if found := provenance.differences(then, hardware.timed_by()):
            told = provenance.said(found)
            raise UserError(f"{directory} was timed by other settings of this machine ({told}); set them back, or remove it to time all again")


def show(plan: Plan) -> None:
    """A table on stderr of what is there of a study and what is not."""
    from rich.console import Console
    from rich.table import Table

    folder, study = settings().runs, plan.study
    table = Table(title=f"study {plan.name}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("", *(["train"] if plan.trainings else []), *study.suites, *(["profile"] if study.profile else [])):
        table.add_column(column)
    for training in plan.trainings:
        if training.name not in {member.training for member in plan.members}:
            table.add_row(training.name, _trained(folder / "train" / training.name, training))
    trainings = {training.name: training for training in plan.trainings}
    profiles = [records.read_run(path.parent).status for path in (folder / "profile" / plan.name).glob("*/run.json")]
    timed = "done" if records.DONE in profiles else "to do"
    for member in plan.members:
        cells = [_trained(folder / "train" / member.training, trainings[member.training]) if member.training else ""] if plan.trainings else []
        for suite in study.suites:
            asked = member.suites.get(suite)
            cells.append(_clips(folder / "bench" / member.name / asked.name, asked, study.scorers) if asked else "")
        if study.profile:
            as_other = member.timed_as and f"as {member.timed_as.rpartition('/')[2]}"
            cells.append(timed if member.timed_as == member.name else as_other or "clip by clip")
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
