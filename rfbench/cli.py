"""The command line: names and fields in, one call to a verb, the path it wrote on stdout. Talk goes to stderr.

Exit 0 done, 1 failed while running, 2 the request was wrong; a UserError is one sentence, anything else a traceback. Verbs
are imported inside their commands, so that `rfbench --help` and shell completion do not wait for torch.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rfbench import config
from rfbench.config import Baseline, External, Study
from rfbench.errors import UserError, did_you_mean
from rfbench.launched import place
from rfbench.options import (
    BaselineName,
    DryRun,
    EngineName,
    Fields,
    Fresh,
    Gpus,
    Json,
    Limit,
    Name,
    RecipeName,
    RunName,
    Shard,
    StudyName,
    Workers,
    compatible,
    completes,
    runs,
    scorers,
    suite_names,
)
from rfbench.output import print_checks, print_profile, print_table
from rfbench.settings import settings

app = typer.Typer(
    help="Train, run, score and time streaming video generators under one protocol.",
    epilog="Start with `rfbench reproduce toy`. Same command again: goes on where it stopped.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
UsageError: Any = typer.BadParameter.__bases__[0]  # typer gives out only this child of it
CHUNKS = 20  # of a stream that is timed
WHAT = ("recipes", "baselines", "suites", "studies", "claims", "scorers", "policies", "methods", "hardware", "environments")


@app.command()
def reproduce(
    study: StudyName,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this contender; may be given several times.", show_default=False)] = None,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the report goes.", show_default=False)] = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    gpus: Gpus = None,
    as_json: Json = False,
) -> None:
    """The whole table of a study: train, generate, score, time and report, skipping what is done. --dry-run says what that takes."""
    from rfbench import reproduce as verb

    if dry_run or gpus:
        told = verb.foresee(study, only or [], limit, gpus or 1)
        return print(json.dumps(told, ensure_ascii=False)) if as_json else None
    _print_path(verb.reproduce(study, only=only or [], limit=limit, fresh=fresh, out=out), as_json)


@app.command()
def train(
    recipe: RecipeName,
    fields: Fields = None,
    share: Annotated[
        int | None,
        typer.Option("--share", min=1, help="Processes that have one copy of every network between them; a node's by default.", show_default=False),
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep frozen networks in the CPU's memory and bring them in block by block.")] = False,
    track: Annotated[str | None, typer.Option("--track", help="tensorboard, wandb or trackio, beside log.jsonl.", show_default=False)] = None,
    name: Name = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make weights by a recipe; writes a baseline beside them. Many processes: `torchrun --nproc-per-node 8 -m rfbench.cli train RECIPE`."""
    from rfbench import train as verb

    how: dict[str, Any] = {"share": share, "offload": offload, "tracker": track}
    directory = verb.train(recipe, fields or [], name=name, fresh=fresh, dry_run=dry_run, **how)
    if place().first:  # of the processes of a launch, one speaks
        _print_path(directory, as_json)


@app.command()
def pairs(
    recipe: RecipeName,
    fields: Fields = None,
    shard: Shard = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Solve the ODE pairs of a recipe before it is trained, on as many machines as there are shards."""
    from rfbench import pairs as verb

    _print_path(verb.solve_all(recipe, fields or [], shard=shard, dry_run=dry_run), as_json)


@app.command()
def generate(
    baseline: BaselineName,
    fields: Fields = None,
    suite: Annotated[str, typer.Option("--suite", help="Name, or a .jsonl or .yaml file.", autocompletion=completes(suite_names))] = "toy-short",
    limit: Limit = None,
    shard: Shard = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="See that everything runs, without the file.")] = False,
    engine: EngineName = "here",
    workers: Workers = None,
    name: Name = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make every clip of a suite with a baseline."""
    from rfbench import generate as verb

    how = {"random_weights": random_weights, "fresh": fresh, "dry_run": dry_run} | _spread(engine, workers)
    _print_path(verb.generate(baseline, suite, fields or [], name=name, limit=limit, shard=shard, **how), as_json)


@app.command()
def sample(
    baseline: BaselineName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='For example "a red disc moves left".', show_default=False)],
    fields: Fields = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    then: Annotated[
        list[str] | None,
        typer.Option("--then", metavar="SECONDS=PROMPT", help="Switch to this prompt on the way; may be given several times.", show_default=False),
    ] = None,
    given: Annotated[
        Path | None, typer.Option("--from", metavar="VIDEO", help="Go on from this video or image; its frames count.", show_default=False)
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Pixel frames: 81, or a system's own length.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out")] = Path("sample.mp4"),
    as_json: Json = False,
) -> None:
    """Make one clip of one prompt."""
    from rfbench import generate as verb

    _print_path(verb.sample(baseline, prompt, fields or [], then=then or [], given=given, seed=seed, frames=frames, out=out), as_json)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Videos called {prompt}-{i}.mp4, i from 0.", show_default=False)],
    baseline: Annotated[str, typer.Option("--baseline", help="Whose they are: a baseline's name, or a new one.", show_default=False)],
    suite: Annotated[str, typer.Option("--suite", help="Name or file.", autocompletion=completes(suite_names), show_default=False)],
    limit: Limit = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Take in videos that were made elsewhere, to be scored like any other."""
    from rfbench import importing as verb

    _print_path(verb.import_videos(folder, baseline, suite, limit=limit, fresh=fresh), as_json)


@app.command("eval")
def evaluate(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="<baseline>/<suite> or its directory.", autocompletion=completes(runs), show_default=False)
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            "-s",
            help="A name, or several between commas; all that need no weights by default.",
            autocompletion=completes(lambda: scorers()),
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="RUN", help="The run to compare with: -s reference.", autocompletion=completes(runs), show_default=False),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score what there is; numbers of an unfinished run stay out of reports.")] = False,
    compat: Annotated[bool, typer.Option("--compat", help="With the habits of the originals: `vbench` is then `vbench-compat`.")] = False,
    check_setup: Annotated[bool, typer.Option("--check-setup", help="Try the scorers, or those named, on two tiny clips.")] = False,
    engine: EngineName = "here",
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Score the clips of a run."""
    names = [name.strip() for text in scorer or [] for name in text.split(",")]
    names = compatible(names) if compat else names
    if check_setup:
        if run is not None or against is not None or partial or fresh or engine != "here":
            raise UserError("--check-setup makes its own clips: give it no run and nothing else but -s")
        from rfbench import rehearsal

        return print_checks(rehearsal.rehearse(names), as_json, strictly=bool(names))
    if run is None:
        raise UserError("say which run to score: rfbench eval <baseline>/<suite>, or its directory")
    from rfbench import evaluate as verb

    how = {"against": None if against is None else _run(against), "partial": partial, "fresh": fresh} | _spread(engine, workers)
    _print_path(verb.evaluate(_run(run), names, **how), as_json)


@app.command()
def profile(
    baselines: Annotated[
        list[str],
        typer.Argument(
            metavar="BASELINE [KEY=VALUE]... ...",
            help="Names or YAML files, timed in turn; fields belong to the name before them.",
            autocompletion=completes(lambda: config.names_of(Baseline)),
            show_default=False,
        ),
    ],
    compare: Annotated[bool, typer.Option("--compare", help="How many times as fast the first of two is, with its interval.")] = False,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Chunks of a stream: 20.", show_default=False)] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds, each of which times everyone once.")] = 9,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Sets of fresh processes that repeat it all, one after another.")] = 1,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Speed does not depend on the weights: do without the file.")] = False,
    ladder: Annotated[bool, typer.Option("--ladder", help="From a plain loop to the sampler and its approximations, step by step.")] = False,
    batch: Annotated[str | None, typer.Option("--batch", help="Clips per second against clips made together.", metavar="1,2,4")] = None,
    streams: Annotated[bool, typer.Option("--streams", help="The most streams at once that meet their deadlines.")] = False,
    training: Annotated[bool, typer.Option("--train", help="The steps of a recipe instead, phase by phase.")] = False,
    name: Name = None,
    fresh: Fresh = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON document, which otherwise comes after a table.")] = False,
) -> None:
    """Time baselines chunk by chunk, in turn; the last line on stdout is one JSON document."""
    from rfbench import profiling as verb

    how: dict[str, Any] = {"name": name, "repeats": repeats, "random_weights": random_weights, "fresh": fresh}
    alone = {"--ladder": ladder, "--train": training, "--batch": batch is not None, "--streams": streams}
    if any(alone.values()):
        (target, fields), *others = verb.grouped(baselines)
        if compare or others or processes != 1 or sum(alone.values()) > 1 or (training and chunks is not None):
            raise UserError(f"{', '.join(alone)} take one baseline, or one recipe, each by itself; leave out the rest, --chunks as well for --train")
        from rfbench import anatomy, load
        from rfbench import ladder as climb

        part: Any = anatomy if training else climb if ladder else load
        how |= ({} if training else {"chunks": chunks or CHUNKS}) | ({"batches": load.counts(batch)} if batch is not None else {})
        directory = part.profile(target, fields, **how)
        return print_profile({"path": _shown(directory)} | part.document(directory), part.table, as_json) if place().first else None
    directory = verb.profile(baselines, compare=compare, chunks=chunks or CHUNKS, processes=processes, **how)
    print_profile({"path": _shown(directory)} | verb.document(directory, compare), verb.table, as_json)


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="All runs by default.", autocompletion=completes(runs), show_default=False)
    ] = None,
    study: Annotated[
        str | None, typer.Option("--study", help="Judge its claims.", autocompletion=completes(lambda: config.names_of(Study)), show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where it goes, instead of the reports folder.", show_default=False)] = None,
    embed: Annotated[bool, typer.Option("--embed", help="Put the videos that the page shows into it, instead of links.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Keep the evidence as records that can be committed.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail unless the committed reports and records are whole and agree.")] = False,
    audit: Annotated[bool, typer.Option("--audit", help="No runs: which published numbers follow from the others, and which do not.")] = False,
    as_json: Json = False,
) -> None:
    """Tables, plots and verdicts, as Markdown, CSV and one HTML page."""
    if audit:
        _audit(as_json, other=bool(runs or study or out or record or check or embed))
        return
    from rfbench import report as verb

    folder = settings().reports / (config.name_of(study) if study else "")  # a study's report lies where `reproduce` puts it
    _print_path(verb.report([_run(run) for run in runs or []], study=study, out=out or folder, record=record, check=check, embed=embed), as_json)


def _audit(as_json: bool, *, other: bool) -> None:
    from rfbench.report import audit

    if other:
        raise UserError("--audit is about published numbers alone; leave out the runs and the other options of report")
    checks = audit.audit()
    print_table([dataclasses.asdict(check) for check in checks] if as_json else audit.table(checks), title="checks", as_json=as_json)


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="<baseline>/<suite> or its directory.", autocompletion=completes(runs), show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.json|FILE.zip", show_default=False)],
    as_json: Json = False,
) -> None:
    """A run as VBench wants it: links with its file names, its results, or the leaderboard's submission."""
    from rfbench import export as verb

    _print_path(verb.export(_run(run), out), as_json)


@app.command()
def total(
    dims: Annotated[str, typer.Argument(metavar="DIMS.json", help="The 16 dimensions by name, in percent; - is standard input.", show_default=False)],
    fractions: Annotated[bool, typer.Option("--fractions", help="The values are fractions of 1.")] = False,
    i2v: Annotated[bool, typer.Option("--i2v", help="The 9 dimensions of VBench-I2V.")] = False,
    compat: Annotated[bool, typer.Option("--compat", help="Count what is missing as 0, as VBench does, and say what that was.")] = False,
) -> None:
    """VBench's Total, Quality and Semantic from its dimensions, as one line of JSON; or a refusal."""
    from rfbench.vbench import totals

    print(totals.line(dims, fractions=fractions, i2v=i2v, compat=compat))


@app.command()
def compare(
    one: RunName,
    other: RunName,
    out: Annotated[Path | None, typer.Option("--out", help="Write a page of the two as well, with players.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Two runs against each other, prompt by prompt."""
    from rfbench.report import pairs as verb

    print_table(verb.compare(_run(one), _run(other), out), title="metrics", as_json=as_json)


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="BASELINE|SCORER|SUITE",
            help="Name or YAML file.",
            autocompletion=completes(lambda: [*config.names_of(Baseline), *config.names_of(External), *scorers(), *suite_names()]),
            show_default=False,
        ),
    ],
    mirror: Annotated[
        Path | None, typer.Option("--mirror", metavar="DIR", help="Take DIR/<owner>/<repository>/<file>, not the network.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Weights of a baseline or a scorer, and prompts of a suite that are not ours to ship; sizes and licences are shown first."""
    from rfbench import fetch as verb
    from rfbench.items import items_named

    paths = [str(path) for path in verb.fetch(items_named(name), mirror=mirror, yes=yes, dry_run=dry_run)]
    for line in [json.dumps(paths, ensure_ascii=False)] if as_json else paths:
        print(line)


@app.command()
def env(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name or YAML file.", autocompletion=completes(lambda: _environments()), show_default=False)
    ],
    options: Annotated[list[str] | None, typer.Option("--with", help="An option of it; may be given several times.", show_default=False)] = None,
    python: Annotated[Path | None, typer.Option("--python", help="The interpreter to build it on.", show_default=False)] = None,
    fresh: Fresh = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands.")] = False,
    as_json: Json = False,
) -> None:
    """Build an interpreter of its own for packages that cannot live beside rfbench's; prints where it is."""
    from rfbench import envs

    path = envs.build(name, options or [], base=python, fresh=fresh, dry_run=dry_run)
    if not dry_run:
        print(json.dumps({"path": str(path)}) if as_json else path)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="|".join(WHAT), autocompletion=completes(lambda: WHAT), show_default=False)], as_json: Json = False
) -> None:
    """What there is, and what it needs."""
    if what not in WHAT:
        raise UserError(f"'{what}' cannot be listed{did_you_mean(what, WHAT)}")
    from rfbench import listing

    print_table(listing.ROWS[what](), title=what, as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can run, and the fix for what it can't."""
    from rfbench import doctor as verb

    print_checks(verb.examine(), as_json)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import rfbench

        print(rfbench.__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _spread(engine: str, workers: int | None) -> dict[str, Any]:
    """Who does the work, as keywords of a verb."""
    if engine not in ("here", "ray"):
        raise UserError(f"--engine {engine}: there are 'here' and 'ray'")
    if engine == "here" and workers is not None:
        raise UserError("--workers is for --engine ray; leave it out, or use --shard")
    return {"engine": engine, "workers": workers}


def _environments() -> list[str]:
    from rfbench import envs

    return envs.names()


def _run(name_or_path: str) -> Path:
    """The directory of a run that somebody names.

    Raises:
        UserError: there is no run of that name and no run in that directory.
    """
    for path in (Path(name_or_path), settings().runs / "bench" / name_or_path):
        if (path / "run.json").is_file() or (path.suffix == ".json" and path.is_file()):
            return path
    from rfbench import mirror

    if not Path(name_or_path).is_absolute() and mirror.bring(path):
        return path
    raise UserError(f"there is no run '{name_or_path}'{did_you_mean(name_or_path, runs())}")


def _print_path(path: Path, as_json: bool) -> None:
    """The path that a verb wrote; as JSON with what its run.json says."""
    if not as_json:
        print(_shown(path))
        return
    document: dict[str, Any] = {"path": _shown(path)}
    if (path / "run.json").is_file():
        from rfbench.records import read_run

        run = read_run(path)
        document |= {"name": run.name, "status": run.status, "fingerprint": run.fingerprint, "seconds": run.seconds, "result": run.result}
    print(json.dumps(document, ensure_ascii=False))


def _shown(path: Path) -> str:
    """A path relative to here if it lies below."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path)


def _say(sentence: str) -> None:
    """One sentence on stderr, unbroken, so that it can be searched for."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text("error: ", style="bold red") + Text(sentence), soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The `rfbench` program; ends the process with its exit code."""
    try:
        code = app(args=arguments, prog_name="rfbench", standalone_mode=False)
    except UserError as error:
        _say(str(error))
        sys.exit(error.code)
    except UsageError as error:
        _say(f"{' '.join(error.format_message().split()).rstrip('.')} (see `{error.ctx.command_path if error.ctx else 'rfbench'} --help`)")
        sys.exit(2)
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say(f"the disk is full ({error.filename or os.strerror(error.errno)}); free space, then the same command goes on from here")
        elif isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)) and error.filename:
            _say(f"{error.filename}: {os.strerror(error.errno or 0).lower()}; name another place")
        else:
            raise
        code = 1
    if code == 130:  # which typer may turn Ctrl-C into when it is not standalone
        _say("interrupted; the same command goes on from here")
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
