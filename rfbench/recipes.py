"""What a recipe asks for: whether its settings fit together, which files it reads, and whether they are there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfbench import strict
from rfbench.backbones.base import parts_of
from rfbench.config import Recipe, WeightsCfg
from rfbench.errors import UserError
from rfbench.methods.base import METHODS
from rfbench.registry import pick
from rfbench.reward import origin_of
from rfbench.settings import settings
from rfbench.weight_files import identity, resolve


def _needs(cfg: Recipe) -> set[str]:
    """Of the settings that belong to a method: those that this recipe cannot do without."""
    if cfg.method == "flow":
        return {"data.clips", "data.drop_caption"}
    if cfg.method == "ode":
        return {"init", "data.latents"} if cfg.data.latents is not None else {"init", "data.pairs", "data.pair_sampler"}
    more = {"redmd": {"reward"}, "sid": {"scores.sid_alpha"}}.get(cfg.method, set())
    shown = {"data.clips" if cfg.data.latents is None else "data.latents"} if forced(cfg) else set()
    return {"init", "scores"} | more | shown


def _may(cfg: Recipe) -> set[str]:
    """Those that it can have or not."""
    if cfg.method in ("flow", "ode"):
        return {"data.prompts"} if cfg.method == "ode" and cfg.data.latents is None else set()
    return {"rollout"} if forced(cfg) else {"data.prompts", "rollout"}


def forced(cfg: Recipe) -> bool:
    """Whether the student is shown clips instead of making them."""
    return cfg.rollout is not None and cfg.rollout.student != "streamed"


def check(cfg: Recipe) -> None:
    """Refuse settings that the method needs and lacks, or has and would not read."""
    pick(METHODS, cfg.method, what="method")
    given: dict[str, Any] = {"init": cfg.init, "scores": cfg.scores, "reward": cfg.reward, "rollout": cfg.rollout}
    given |= {"scores.sid_alpha": None if cfg.scores is None else cfg.scores.sid_alpha}
    given |= {f"data.{item.name}": getattr(cfg.data, item.name) for item in dataclasses.fields(cfg.data) if item.name != "seed"}
    needs, may = _needs(cfg), _may(cfg)
    for key, value in given.items():
        if key not in may and (value is not None) != (key in needs):
            raise UserError(f"recipe '{cfg.title}': method '{cfg.method}' {'needs' if value is None else 'does not use'} '{key}'")
    for wrong, sentence in _problems(cfg):
        if wrong:
            raise UserError(f"recipe '{cfg.title}': {sentence}")
    if cfg.reward is not None:
        origin_of(cfg.reward)


def _problems(cfg: Recipe) -> list[tuple[bool, str]]:
    """What settings may not be together with what others, and a sentence about it."""
    scores, sampler, precision = cfg.scores, cfg.sampler, cfg.precision
    chunk = sampler.chunk or 1
    return [
        (cfg.batch % cfg.accumulate != 0, f"a batch of {cfg.batch} does not split into {cfg.accumulate} equal micro-batches"),
        (cfg.checkpoint_every % cfg.log_every != 0, "'checkpoint_every' must be a multiple of 'log_every', or a resumed run would log other means"),
        (cfg.method == "ode" and sampler.chunk is None, "method 'ode' makes a streaming student and needs a sampler with 'chunk' and 'cache'"),
        (
            scores is not None and sampler.guidance != 1.0,
            "a student learns its teacher's guidance; leave 'sampler.guidance' at 1 and set 'scores.guidance'",
        ),
        (
            cfg.method != "flow" and sampler.solver != "renoise",
            "a student is trained to be clean at any of its steps; that takes 'sampler.solver: renoise'",
        ),
        (cfg.latents % chunk != 0, f"{cfg.latents} latent frames are not whole chunks of {chunk}"),
        (cfg.stepping != "once" and scores is None, "'stepping' is about a generator and a critic; leave it out"),
        (
            precision is not None and scores is None and (precision.teacher or precision.critic) is not None,
            f"method '{cfg.method}' has neither teacher nor critic; leave 'precision.teacher' and 'precision.critic' out",
        ),
        (
            scores is not None and scores.teacher_backbone not in (None, cfg.backbone) and scores.critic is None,
            f"a teacher on '{scores and scores.teacher_backbone}' can't be the critic's start; give 'scores.critic'",
        ),
        (
            cfg.backbone.startswith("wan") and cfg.data.prompts is None and cfg.data.latents is None and cfg.method != "flow",
            f"backbone '{cfg.backbone}' does not train on sentences of the toy world; give 'data.prompts'",
        ),
        (cfg.backbone.startswith("wan") and cfg.data.clips is not None, f"clips of the toy world can't train backbone '{cfg.backbone}'"),
        (
            forced(cfg) and (sampler.chunk is None or scores is None or cfg.latents > scores.latents),
            "a forced student takes chunks, of clips that the score models can judge; see 'sampler.chunk', 'latents' and 'scores.latents'",
        ),
        (
            cfg.samples is not None and (cfg.samples.every < 1 or not cfg.samples.prompts or cfg.samples.latents % chunk != 0),
            "'samples' needs a prompt, whole chunks, and a step at least between one time and the next",
        ),
    ]


def roles(cfg: Recipe) -> dict[str, WeightsCfg]:
    """The checkpoints that a recipe starts from."""
    named = {"student": cfg.init}
    if cfg.scores is not None:
        named |= {"teacher": cfg.scores.teacher, "critic": cfg.scores.critic}
    return {role: weights for role, weights in named.items() if weights is not None}


def files(cfg: Recipe) -> dict[str, WeightsCfg]:
    """Everything that a recipe reads: checkpoints, prompts, and the parts that its backbone has beside a checkpoint."""
    read = {"prompts": cfg.data.prompts, "latents": cfg.data.latents}
    named = {role: WeightsCfg(one.file, one.repo, one.revision, sha256=one.sha256) for role, one in read.items() if one is not None}
    return roles(cfg) | named | parts_of(cfg.backbone)


def locate(cfg: Recipe, path: Path) -> dict[str, Path]:
    """Where the files of a recipe are that was read from `path`.

    Raises:
        UserError: one is missing or altered; where several are, it names all of them.
    """
    found, problems = dict[str, Path](), dict[str, UserError]()
    wanted: dict[str, Callable[[], Path]] = {role: functools.partial(resolve, one, path) for role, one in files(cfg).items()}
    if cfg.reward is not None and (read := origin_of(cfg.reward).file) is not None:
        wanted["reward"] = read
    for role, look in wanted.items():
        try:
            found[role] = look()
        except UserError as error:
            problems[role] = error
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        names = {role: f"{one.file} of {one.repo}" if one.repo else one.file for role, one in files(cfg).items()}
        lacking = ", ".join(f"{role} ({names.get(role, 'VideoReward')})" for role in problems)
        raise UserError(
            f"recipe {path.name} lacks {len(problems)} files: {lacking}; put each beside the recipe or below "
            f"{settings().weights}, in a folder of its repository's name"
        )
    return found


def inputs_of(cfg: Recipe, sources: dict[str, Path]) -> dict[str, Any]:
    """The declared inputs of a training run: the recipe, and the hashes of what it reads."""
    hashes = {role: identity(sources[role], one) for role, one in files(cfg).items()}
    checkpoints = {role: hashes.pop(role) for role in roles(cfg)}
    found = {"recipe": strict.as_plain(cfg), "weights": checkpoints} | ({"files": hashes} if hashes else {})
    if cfg.reward is not None and (version := origin_of(cfg.reward).version()) is not None:
        found["reward"] = version
    return found
