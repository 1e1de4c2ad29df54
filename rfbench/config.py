"""The nouns that a person writes, as frozen dataclasses.

Every key is a field that somebody reads; a setting that would not be used is a UserError. `rfbench.strict` builds them. Torch is not imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from rfbench.errors import UserError, did_you_mean
from rfbench.learning import EmaCfg as EmaCfg
from rfbench.learning import FileCfg as FileCfg
from rfbench.learning import OptimCfg as OptimCfg
from rfbench.learning import Precision as Precision
from rfbench.learning import PrecisionCfg as PrecisionCfg
from rfbench.learning import RewardCfg as RewardCfg
from rfbench.learning import SamplesCfg as SamplesCfg
from rfbench.learning import Streamed as Streamed
from rfbench.settings import HOME
from rfbench.strict import build, load_plain


@dataclass(frozen=True)
class CacheCfg:
    """Which frames a chunk may look back at. `window` counts sink and the chunk itself, in latent frames."""

    policy: str  # full | window | static_sink | ema_sink
    window: int | None = None  # all but `full`
    sink: int | None = None  # static_sink, ema_sink
    alpha: float | None = None  # ema_sink: share of the old sink that stays when a frame is folded in (paper Eq. 5)
    fold_dtype: Literal["float32", "bfloat16"] | None = None  # ema_sink: the dtype that the average is kept in (D-4, D-38)
    rope: Literal["absolute", "relative"] = "relative"
    mismatch: Literal["average", "overwrite"] = "average"  # ema_sink, more or fewer frames leave than the sink has: the release overwrites (D-12)
    shot_offset: int | None = None  # static_sink: a switched prompt begins a shot, so many frames further, whose first frames are a sink too
    empty_sink: Literal["ignored", "attended"] = "ignored"  # sink slots that no frame has reached yet; the release attends to their zeros (D-37)

    def __post_init__(self) -> None:
        needs = {"full": [], "window": ["window"], "static_sink": ["window", "sink"], "ema_sink": ["window", "sink", "alpha", "fold_dtype"]}
        if self.policy not in needs:
            raise UserError(f"cache policy '{self.policy}' does not exist{did_you_mean(self.policy, needs)}")
        for name in ("window", "sink", "alpha", "fold_dtype"):
            if (getattr(self, name) is not None) != (name in needs[self.policy]):
                wanted = "needs" if name in needs[self.policy] else "does not use"
                raise UserError(f"cache policy '{self.policy}' {wanted} '{name}'")
        if self.policy == "ema_sink" and self.rope == "absolute":
            raise UserError(
                "cache policy 'ema_sink' with rope 'absolute' would average keys that were rotated to different positions; use rope 'relative'"
            )
        if self.mismatch != "average" and self.policy != "ema_sink":
            raise UserError(f"cache policy '{self.policy}' does not use 'mismatch'")
        if self.empty_sink != "ignored" and (not self.sink or self.rope == "absolute"):
            raise UserError("cache 'empty_sink' is about a sink under rope 'relative'; leave it out")
        if self.shot_offset is not None and (self.policy != "static_sink" or self.rope != "absolute" or self.shot_offset < 0):
            raise UserError("cache 'shot_offset' is a number of frames, for policy 'static_sink' with rope 'absolute'; leave it out")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"cache alpha is {self.alpha}; it is a share between 0 and 1")
        if min(self.window or 0, self.sink or 0) < 0 or self.window == 0:
            raise UserError(f"cache window {self.window} and sink {self.sink} are numbers of latent frames, of which a window has at least one")


@dataclass(frozen=True)
class RerollCfg:
    """How clips are made that are longer than a model's rollouts: each begins with the last frames of the one before.

    `anew` says which of these are encoded anew from the pixels that they became: the first (CausVid), all (SkyReels-V2), or none
    (SkyReels-V2 in diffusers). CausVid shows them as the later rollout decodes them, SkyReels-V2 as the earlier one does.
    """

    latents: int  # of one rollout
    overlap: int  # latent frames that two rollouts share
    anew: Literal["first", "all", "none"] = "first"


@dataclass(frozen=True)
class SamplerCfg:
    """How a clip is made: one loop over chunks, `steps` passes each, then a clean pass that fills the cache.

    `solver: renoise` predicts the clean chunk and adds fresh noise for the next step (few-step students); `euler` follows
    the flow (many-step teachers), and so does `unipc`, in second order and on Wan's own grid of timesteps. `chunk: null`
    makes all frames at once, which is the bidirectional sampler. `rolling` is `renoise` with as many chunks in work as there
    are steps, each at another one (Rolling Forcing). `forcing` is `unipc` with all frames in work at once and a timestep for
    each of them: in step without `chunk`, else a chunk `lag` steps behind the one before it (SkyReels-V2); it has no cache.
    """

    steps: tuple[int, ...] | int  # timesteps of 1000 in the order taken, or a number of evenly spaced ones
    shift: float
    warp: bool = True  # look the steps up in the shifted table (1000, 937.5, ...) instead of taking them as they are
    chunk: int | None = 3  # latent frames
    solver: Literal["renoise", "euler", "unipc", "rolling", "forcing"] = "renoise"
    lag: int | None = None  # forcing, exactly when `chunk` is given
    causal: bool = False  # forcing with chunks: none sees those after it
    first_state: Literal["kept", "overwritten"] = "kept"  # forcing: what the solver's first correction starts from; the releases overwrite it
    guidance: float = 1.0  # classifier-free guidance; 1 runs no unconditional pass
    negative: str = ""  # prompt of the unconditional pass
    context_noise: float = 0.0  # sigma of the noise on the clean pass (D-32: the released training has 0.00498); forcing: on given frames
    context: Literal["clean", "last_step"] = "clean"  # approximate: no clean pass, later chunks look back at what the last step left
    cache: CacheCfg | None = None  # exactly when `chunk` is given, but not with `forcing`
    reroll: RerollCfg | None = None  # null: one rollout, as long as the clip

    def __post_init__(self) -> None:
        listed = (self.steps,) if isinstance(self.steps, int) else self.steps
        if not listed or not all((step > 0 if isinstance(self.steps, int) else 0 <= step <= 1000) for step in listed):
            raise UserError(f"steps is {self.steps}; it is a list of timesteps from 1000 down to 0, or a number of steps from 1 up")
        if not self.shift > 0 or (self.chunk is not None and self.chunk < 1):
            raise UserError(f"shift is {self.shift} and chunk {self.chunk}; a shift is above 0, and a chunk has at least one latent frame")
        if self.solver == "forcing":
            self._check_forcing()
        elif self.lag is not None or self.causal or self.first_state != "kept":
            raise UserError(f"solver '{self.solver}' does not use 'lag', 'causal' and 'first_state'; leave them out")
        elif (self.chunk is None) != (self.cache is None):
            raise UserError("a sampler has a cache exactly when it has a chunk: give both, or neither for the bidirectional sampler")
        if isinstance(self.steps, int) and not self.warp:
            raise UserError("a number of steps is spaced on the shifted grid; 'warp: false' needs a list of timesteps")
        if self.solver in ("unipc", "forcing") and not isinstance(self.steps, int):
            raise UserError(f"solver '{self.solver}' has a grid of its own; give a number of steps, not a list")
        if self.context != "clean" and (self.cache is None or self.context_noise or self.solver == "rolling"):
            raise UserError("context 'last_step' leaves out the clean pass of a sampler with a cache and no 'context_noise'; leave it out")
        if self.negative and self.guidance == 1.0:
            raise UserError("a 'negative' prompt is not used without guidance; set 'guidance', or leave it out")
        if self.cache is not None and self.cache.empty_sink == "attended" and (self.chunk or 0) >= (self.cache.sink or 0):
            raise UserError("cache 'empty_sink' changes nothing where a chunk fills the sink; leave it out")
        if (
            self.cache is not None
            and self.cache.shot_offset is not None
            and (self.cache.window or 0) < 2 * (self.cache.sink or 0) + (self.chunk or 0)
        ):
            raise UserError("cache 'shot_offset' needs a 'window' for two sinks and a chunk")
        if self.solver == "rolling":
            self._check_rolling()
        if self.reroll is not None and not self._rerolls(self.reroll):
            raise UserError("'reroll' needs whole chunks: 'latents' and 'overlap' are multiples of 'chunk', and 'overlap' is the smaller one")

    def _rerolls(self, reroll: RerollCfg) -> bool:
        """Whether rollouts and what they share are chunks, or a bidirectional sampler that can go on from given frames."""
        if self.chunk is None and self.solver != "forcing":
            return False
        chunk = self.chunk or 1
        return 0 < reroll.overlap < reroll.latents and reroll.latents % chunk == 0 and reroll.overlap % chunk == 0

    def _check_forcing(self) -> None:
        """What a timestep per frame rules out."""
        if self.cache is not None:
            raise UserError("solver 'forcing' keeps all frames in work and has no 'cache'; leave it out")
        if (self.chunk is None) != (self.lag is None) or (self.lag is not None and self.lag < 1):
            raise UserError("solver 'forcing' needs a 'lag' of at least one step exactly when it has a 'chunk'; without both all frames go in step")
        if self.causal and self.chunk is None:
            raise UserError("solver 'forcing' is 'causal' from chunk to chunk; give a 'chunk' and a 'lag', or leave it out")

    def _check_rolling(self) -> None:
        """What the joint window takes for granted."""
        cache, chunk = self.cache, self.chunk
        if cache is None or chunk is None or cache.policy != "static_sink" or cache.rope != "absolute" or isinstance(self.steps, int):
            raise UserError("solver 'rolling' needs a list of steps, and a cache of policy 'static_sink' with rope 'absolute'")
        if (cache.window or 0) < (cache.sink or 0) + len(self.steps) * chunk or (cache.sink or 0) > chunk:
            raise UserError("solver 'rolling' needs a 'window' for the sink and a chunk per step, and a sink no longer than a chunk")
        if self.guidance != 1.0 or self.context_noise or self.reroll is not None:
            raise UserError("solver 'rolling' does not use 'guidance', 'context_noise' or 'reroll'")


@dataclass(frozen=True)
class LoraCfg:
    """A LoRA adapter, in PEFT's layout, that is merged into the checkpoint beside it: W + alpha / rank B A."""

    file: str  # in the same repository
    rank: int
    alpha: float
    key: str | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class WeightsCfg:
    """Where the denoiser's tensors lie. `file` is a file, a folder (diffusers) or a pattern (`model-*.safetensors`); a relative
    one is looked up beside the YAML file that names it, then in the weights directory of rfbench.toml, where every Hugging Face
    repository has a folder of its own."""

    file: str
    repo: str | None = None  # Hugging Face repository that `file` comes from
    revision: str | None = None  # its commit
    bytes: int | None = None  # size, of all files together
    key: str | None = None  # entry of a nested .pt file
    strip: str = ""  # prefix that every tensor name carries, once the wrappers of FSDP, checkpointing and compiling are off
    sha256: str | None = None  # of the file; of several files, of their names and hashes (`weight_files.sha256_of`)
    lora: LoraCfg | None = None


@dataclass(frozen=True)
class License:
    code: str
    weights: str
    note: str = ""


@dataclass(frozen=True)
class Baseline:
    """A contender: weights, backbone, sampler settings, what it was trained on. What was printed about it: `rfbench.published`."""

    title: str
    backbone: str
    weights: WeightsCfg
    sampler: SamplerCfg
    license: License
    precision: Streamed | None = None  # of the network; null is the backbone's own; float8: approximate, and marked wherever it counts
    attention: Literal["float8"] | None = None  # of tokens to each other in streams; approximate likewise
    decoder: Literal["vae", "tiny"] | None = None  # tiny: approximate likewise
    paper: str | None = None
    code: str | None = None  # the authors': GitHub repository@commit
    max_latents: int | None = None  # longest clip that it can make; None is any length
    saw: tuple[str, ...] = ()  # metrics that were optimised in training
    trained_by: dict[str, Any] = field(default_factory=dict)  # written by `train`: recipe, fingerprint, commit

    def __post_init__(self) -> None:
        if "float8" in (self.precision, self.attention) and self.sampler.solver in ("rolling", "forcing"):
            raise UserError(
                f"precision or attention 'float8' is for passes of one chunk, and solver '{self.sampler.solver}' has several in work; leave it out"
            )

    @property
    def approximate(self) -> tuple[str, ...]:
        """What of it is not computed as its authors do; every number that it was part of is marked."""
        eight = {"8-bit products": self.precision == "float8", "8-bit attention": self.attention == "float8"}
        return tuple(name for name, there in (eight | {"tiny decoder": self.decoder == "tiny"}).items() if there)


@dataclass(frozen=True)
class External:
    """A contender that its authors' code runs, in an environment of its own and by its own protocol: it says which."""

    title: str
    env: str  # of `rfbench env`
    runner: str  # a file of rfbench/runners
    weights: WeightsCfg
    license: License
    height: int  # pixels
    width: int
    fps: int
    frames: int  # of its clip, for every suite that is no longer than `rfbench.external.SHORT_S`
    steps: tuple[int, ...]  # of its sampler, as its authors count them
    longer: int | None = None  # frames that a longer clip has more, or a multiple of them; null: there is no longer clip
    most: int | None = None  # frames of the longest clip
    suffix: str = ""  # what its code appends to every prompt
    settings: dict[str, Any] = field(default_factory=dict)  # for the runner, by the names of the authors' code
    parts: dict[str, WeightsCfg] = field(default_factory=dict)  # other weights that the runner loads
    startup_s: float = 1800.0  # limit for loading
    clip_s: float = 3600.0  # limit for a clip
    takes_s: float | None = None  # seconds that a clip of its own length and size is known to take once the model is loaded; for plans alone
    takes_by: str = ""  # who says so, and on what
    paper: str | None = None
    code: str | None = None
    saw: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.longer is None) != (self.most is None):
            raise UserError("a longer clip needs 'longer' and 'most'; give both, or neither")

    @property
    def protocol(self) -> str:
        """Its own protocol, for people."""
        steps = "+".join(map(str, self.steps))
        suffix = f"; its code appends '{self.suffix}' to every prompt" if self.suffix else ""
        return f"own protocol: {self.width}x{self.height}, {self.frames} frames at {self.fps} per second, {steps} steps{suffix}"


@dataclass(frozen=True)
class ScoreCfg:
    """The two score models of distribution matching (DMD) and how they are compared."""

    teacher: WeightsCfg
    guidance: float  # of the real score, as in SamplerCfg: 1 is none (the released `real_guidance_scale: 3.0` is 4 here)
    generator_every: int  # critic steps for one generator step
    critic_optim: OptimCfg
    score_shift: float  # sigma table of the score models (D-33: the release has 8 beside a critic loss at 5)
    teacher_backbone: str | None = None  # null: the student's; another one needs `critic`
    critic: WeightsCfg | None = None  # what the critic starts from, on the student's backbone; null: the teacher's weights
    rollouts: Literal["shared", "separate"] = "shared"  # whether student and critic learn from one rollout, or from one each as in the releases
    t_min: int = 20
    t_max: int = 980
    negative: str = ""  # prompt of the teacher's unconditional score
    latents: int = 21  # longest clip that is judged: of a longer rollout the last frames, the first of them made anew from pixels
    sid_alpha: float | None = None  # of score identity distillation, exactly with method 'sid'
    cache_gradients: Literal["detached", "in_place"] = "detached"  # whether cached keys and values carry gradients, as in the release (D-34)


@dataclass(frozen=True)
class DataCfg:
    """What training reads. `clips` for flow matching, `pairs` for ODE regression, prompts alone for DMD."""

    prompts: FileCfg | None = None  # .txt with one per line, or .jsonl with one per line as 'prompt'; null: sentences of the toy world
    latents: FileCfg | None = None  # LMDB as Self Forcing writes it: trajectories, instead of `pairs`; for a student that is shown clips, those
    clips: int | None = None
    pairs: int | None = None
    pair_sampler: SamplerCfg | None = None  # how the teacher solves the ODE that the pairs lie on
    seed: int = 0
    drop_caption: float | None = None  # share of clips whose caption is dropped, for classifier-free guidance


@dataclass(frozen=True)
class RolloutCfg:
    """In what a release's training rollouts are not what its sampler does; null is as the sampler."""

    cache: CacheCfg | None = None  # D-3: the released training never folds anything into the sink
    context_noise: float | None = None  # D-32
    # Others do not stream what they make: they denoise chunks of given clips, each at a timestep of its own (CausVid).
    # diffusion_forced: all in one pass, what is before a chunk as noisy as it is; teacher_forced: one by one, behind clean ones in the cache
    student: Literal["streamed", "diffusion_forced", "teacher_forced"] = "streamed"

    def __post_init__(self) -> None:
        said = self.cache is not None or self.context_noise is not None
        if said == (self.student != "streamed"):
            raise UserError("'rollout' is 'cache' or 'context_noise' of streamed rollouts, or a 'student' that is shown clips, which has neither")


@dataclass(frozen=True)
class Recipe:
    """How to make weights."""

    title: str
    method: str  # flow | ode | dmd | redmd | sid
    backbone: str
    steps: int  # optimiser steps; for DMD, critic steps
    batch: int  # clips per optimiser step
    latents: int  # latent frames per clip
    optim: OptimCfg
    data: DataCfg
    sampler: SamplerCfg  # that the trained model will be run with
    seed: int = 0
    accumulate: int = 1  # micro-batches that `batch` is split into
    stepping: Literal["once", "as_released"] = "once"  # as_released: a step is one micro-batch, after which the optimisers step, some twice (D-1)
    precision: PrecisionCfg | None = None
    checkpointing: bool = False  # compute activations anew in the backward pass, block by block, and do not keep them
    init: WeightsCfg | None = None
    scores: ScoreCfg | None = None
    reward: RewardCfg | None = None
    rollout: RolloutCfg | None = None
    ema: EmaCfg | None = None
    samples: SamplesCfg | None = None
    max_latents: int | None = None  # goes into the baseline that the recipe writes
    log_every: int = 10
    checkpoint_every: int = 100
    needs: str = ""  # memory, time, machine: for people

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "latents", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a number from 1 up")


@dataclass(frozen=True)
class Contender:
    """A row of a study: a baseline to run as it is, a recipe to train first (once per seed), or a variant of another row."""

    name: str
    baseline: str | None = None
    recipe: str | None = None
    of: str | None = None
    seeds: tuple[int, ...] = (0,)  # training seeds, with `recipe`
    set: dict[str, Any] = field(default_factory=dict)  # overrides: of the recipe with `recipe`, of the baseline otherwise
    suites: tuple[str, ...] | None = None  # None: all of the study's
    system: str | None = None  # whose published numbers stand beside its own; None: its baseline's, if nothing is `set`

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.baseline, self.recipe, self.of)) != 1:
            raise UserError(f"contender '{self.name}' needs exactly one of 'baseline', 'recipe' and 'of'")
        if self.recipe is None and self.seeds != (0,):
            raise UserError(f"contender '{self.name}': 'seeds' are training seeds and need 'recipe'")


@dataclass(frozen=True)
class Claim:
    """`better` beats `than` on `metric` of `suite`; which direction is better is the metric's own property."""

    id: str
    metric: str  # "<scorer>.<metric>" or "profile.<metric>"
    better: str
    than: str
    suite: str | None = None  # None for profile metrics
    text: str = ""  # that of the paper's claim where it is one
    says: str | None = None  # which claim of the paper this tests (`rfbench list claims`); None: the one with its id, if there is one
    margin: float = 0.0  # the claim is a difference of more than this; of timings, of more than this many per cent


@dataclass(frozen=True)
class ProfileCfg:
    """How `profile` times the contenders of a study, in turn."""

    chunks: int  # of a stream
    repeats: int  # rounds, each of which times every contender once
    processes: int = 1  # fresh sets of processes that repeat it all


@dataclass(frozen=True)
class Study:
    """A table to reproduce."""

    title: str
    suites: tuple[str, ...]
    scorers: tuple[str, ...]
    contenders: tuple[Contender, ...]
    claims: tuple[Claim, ...] = ()
    profile: ProfileCfg | None = None
    needs: str = ""

    def scaled(self, share: str) -> Study:
        """The same table over a share of every suite's prompts, which then is part of the suites' names."""

        def of(suite: str) -> str:
            return f"{suite}@{share}"

        contenders = tuple(replace(one, suites=None if one.suites is None else tuple(map(of, one.suites))) for one in self.contenders)
        judged = tuple(replace(claim, suite=None if claim.suite is None else of(claim.suite)) for claim in self.claims)
        title = f"{self.title}, {float(share):.3g} of the prompts"
        return replace(self, title=title, suites=tuple(map(of, self.suites)), contenders=contenders, claims=judged)


Noun = TypeVar("Noun")
FOLDERS: dict[type, str] = {Recipe: "recipes", Baseline: "baselines", External: "baselines", Study: "recipes/studies"}
INSIDE = {Recipe: "studies/", Baseline: "external/", External: "external/"}  # names in a folder that are another noun's; or External's own


def names_of(kind: type) -> dict[str, Path]:
    """Name -> file of every recipe, baseline or study that ships beside the package."""
    folder = HOME / FOLDERS[kind]
    found = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if kind is Study or name.startswith(INSIDE[kind]) == (kind is External)}


def name_of(name_or_path: str) -> str:
    """What the runs of a recipe, baseline or study are called that was given by name or by path; `@0.02` stays with it."""
    whole, at, share = name_or_path.partition("@")
    return (Path(whole).stem if whole.endswith((".yaml", ".yml")) else whole) + at + share


def whole_name(kind: type, name: str) -> str:
    """The name of a shipped file that is given by it or by its last part: `self-forcing` is `wan/self-forcing` if no other ends so.

    A path comes back as it is.

    Raises:
        UserError: no name or several end so.
    """
    known = names_of(kind)
    if name in known or name.endswith((".yaml", ".yml")):
        return name
    ending = [whole for whole in known if whole.endswith(f"/{name}")]
    if not ending:
        raise UserError(
            f"there is no {kind.__name__.lower()} '{name}'{did_you_mean(name, [*known, *(names_of(External) if kind is Baseline else ())])}"
        )
    if len(ending) > 1:
        raise UserError(f"{kind.__name__.lower()} '{name}' can be {' or '.join(ending)}; write the whole name")
    return ending[0]


def find(kind: type, name: str) -> Path:
    """The YAML file of a name (`toy/teacher`, or its last part where that is enough) or path.

    Raises:
        UserError: there is no such file, or several names end so.
    """
    whole = whole_name(kind, name)
    path = names_of(kind).get(whole, Path(whole))
    if not path.is_file():
        raise UserError(f"{kind.__name__.lower()} {name}: there is no such file")
    return path.resolve()


def load(kind: type[Noun], name: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Noun:
    """Read a recipe, baseline or study by name or path, apply `KEY=VALUE` overrides, check every key.

    `STUDY@0.02` is the study over two per cent of its prompts.

    Raises:
        UserError: unknown name, unknown key, wrong type, or a setting that would not be used; says where and what to do.
    """
    if kind is Study and "@" in name:
        name, _, share = name.rpartition("@")
        if not re.fullmatch(r"0?\.\d*[1-9]\d*", share):
            raise UserError(f"study '{name}': '{share}' is no share of its prompts; write one between 0 and 1, for example {name}@0.02")
        whole: Any = load(Study, name, overrides)
        return cast("Noun", whole.scaled(f"{float(share):g}"))
    return build(kind, load_plain(find(kind, name), overrides, kind), where=name)


def is_external(name: str) -> bool:
    """Whether a baseline's name or path is that of a system that its authors' code runs."""
    if name.endswith((".yaml", ".yml")):
        return "runner" in load_plain(find(External, name), (), External)
    return any(known == name or known.endswith(f"/{name}") for known in names_of(External)) and name not in names_of(Baseline)


def told(plain: Any, *, where: str) -> Baseline | External:
    """A baseline of either kind from plain data."""
    found: Baseline | External = build(External if isinstance(plain, dict) and "runner" in plain else Baseline, plain, where=where)
    return found
