"""ODE pairs on disk: trajectories of the teacher's sampler, in parts that anybody can make in any order and that no training keeps in memory.

    runs/pairs/<fingerprint>/{run.json, part_00003.safetensors}     ours: `path` [N, S, F, C, H, W], captions in the header
    data.mdb                                                        Self Forcing's and CausVid's LMDB (guandeh17/Self-Forcing@33593df utils/lmdb.py)

Trainings that ask for the same pairs read the same ones.

Shapes: N trajectories, S entries of one, the clean latents last; B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rfbench import config, provenance, recipes, records, strict
from rfbench.backbones.base import Backbone, load
from rfbench.baselines import device
from rfbench.config import Recipe
from rfbench.data import ClipDraws, Prompts, prompts_of
from rfbench.errors import UserError
from rfbench.methods.ode import solve
from rfbench.parallel import ALONE, Ranks
from rfbench.progress import Progress, say
from rfbench.sampler import timesteps
from rfbench.settings import settings
from rfbench.suites import shard as shard_of
from rfbench.weight_files import identity
from rfbench.weights import save

PART = 16  # trajectories of a file, and of a batch of the teacher


class StoredPairs:
    """Trajectories in the files of `make`, read as they are needed."""

    def __init__(self, files: Sequence[Path], steps: tuple[float, ...]) -> None:
        self.timesteps = steps
        self.files = [_opened(path) for path in files]
        self.captions = [caption for file in self.files for caption in json.loads(json.loads(file.metadata()["about"])["captions"])]

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One trajectory per generator: [B, S, F, C, H, W] and captions."""
        index = draws.integers(len(self.captions))
        rows = [self.files[number // PART].get_slice("path")[number % PART : number % PART + 1] for number in index]
        return torch.cat(rows), [self.captions[number] for number in index]

    def prompts(self, draws: ClipDraws) -> list[str]:
        """The captions that `pick` would give."""
        return [self.captions[number] for number in draws.integers(len(self.captions))]


class LmdbPairs:
    """Trajectories, or clean latents alone, in the LMDB layout of Self Forcing: float16 rows `latents_<i>_data` and `prompts_<i>_data`."""

    def __init__(self, file: Path, steps: tuple[float, ...], *, frames: int) -> None:
        """`steps` are the timesteps that the entries stand for, without the clean one; of clean latents alone, none.

        Raises:
            UserError: it is no such database, or its trajectories have other entries or lengths.
        """
        self.timesteps = steps
        self.file, self.store = file, _lmdb(file)
        self.shape = _shape_of(self.store, file)
        if self.shape[1:3] != (len(steps) + 1, frames):
            raise UserError(
                f"{file} holds {self.shape[1]} entries of {self.shape[2]} latent frames for each clip; the recipe takes {len(steps) + 1} of {frames}"
            )

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One trajectory per generator: float32 [B, S, F, C, H, W] and captions."""
        rows = [self._row(number) for number in draws.integers(self.shape[0])]
        return torch.stack([path for path, _ in rows]), [caption for _, caption in rows]

    def ends(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """One clean clip per generator: [B, F, C, H, W] and captions."""
        path_BSFCHW, captions = self.pick(draws)
        return path_BSFCHW[:, -1], captions

    def prompts(self, draws: ClipDraws) -> list[str]:
        """The captions that `pick` would give."""
        return [self._read("prompts", number).decode() for number in draws.integers(self.shape[0])]

    def _row(self, number: int) -> tuple[Tensor, str]:
        latents = self._read("latents", number)
        if len(latents) != 2 * math.prod(self.shape[1:]):
            raise UserError(f"{self.file}: row {number} is too short; fetch it again", code=1)
        path = np.frombuffer(latents, np.float16).reshape(self.shape[1:])
        return torch.from_numpy(path.astype(np.float32)), self._read("prompts", number).decode()

    def _read(self, name: str, number: int) -> bytes:
        with self.store.begin() as reading:
            found: bytes | None = reading.get(f"{name}_{number}_data".encode())
        if found is None:
            raise UserError(f"{self.file}: row {number} is missing; fetch it again", code=1)
        return found


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _lmdb(file: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"{file} is read by the package lmdb, which is not installed; run `pip install lmdb`") from None
    try:
        return lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{file} is not an LMDB database ({error})") from None


def _shape_of(store: Any, file: Path) -> tuple[int, ...]:
    """[N, S, F, C, H, W] of a database; clean latents alone are trajectories of one entry."""
    with store.begin() as reading:
        text = reading.get(b"latents_shape")
    try:
        shape = tuple(int(size) for size in text.decode().split())
    except (AttributeError, ValueError):
        raise UserError(f"{file} has no 'latents_shape'; it is not a database of latents") from None
    if len(shape) == 5:
        shape = (shape[0], 1, *shape[1:])
    if len(shape) != 6:
        raise UserError(f"{file}: 'latents_shape' has {len(shape)} sizes; latents have 5, trajectories 6")
    return shape


def of(cfg: Recipe, teacher: Backbone, prompts: Prompts, sources: Mapping[str, Path], ranks: Ranks = ALONE) -> StoredPairs | LmdbPairs:
    """The pairs of a recipe: from its file, or from its teacher, which is what the student starts from; what is not there yet is made by all.

    Raises:
        UserError: the file is not what the recipe asks for; as `make`.
    """
    if "latents" in sources:
        return LmdbPairs(sources["latents"], timesteps(cfg.sampler), frames=cfg.latents)
    inputs, shard = inputs_of(cfg, sources), None if ranks.size == 1 else f"{ranks.rank + 1}/{ranks.size}"
    made = make(cfg, teacher, prompts, inputs, shard=shard)
    ranks.wait()
    made = made or make(cfg, teacher, prompts, inputs, shard=shard)  # the others' parts are there now
    assert made is not None, "whoever makes all parts finds all parts"
    return made


def solve_all(recipe: str, overrides: Sequence[str] = (), *, shard: str | None = None, dry_run: bool = False) -> Path:
    """`rfbench pairs`: make the pairs of a recipe before it is trained, on as many machines as there are shards.

    Returns:
        their directory.

    Raises:
        UserError: the recipe has no pairs to make, or its teacher or prompts are missing; as `make`.
    """
    path = config.find(Recipe, recipe)
    cfg = strict.build(Recipe, strict.load_plain(path, list(overrides), Recipe), where=recipe)
    recipes.check(cfg)
    if cfg.data.pairs is None:
        raise UserError(f"recipe '{recipe}' has no pairs to make: its method is '{cfg.method}', or its data come from a file")
    sources = recipes.locate(cfg, path)
    inputs = inputs_of(cfg, sources)
    parts = -(-cfg.data.pairs // PART)
    if dry_run:
        there = len(list(directory_of(inputs).glob("part_*.safetensors")))
        say(f"{cfg.data.pairs} pairs in {parts} parts, {there} parts are there")
        return directory_of(inputs)
    assert cfg.init is not None
    teacher = load(cfg.backbone, cfg.init, sources["student"], precision=cfg.precision and cfg.precision.student)
    assert isinstance(teacher, nn.Module)
    teacher.requires_grad_(False).to(device())
    make(cfg, teacher, prompts_of(sources.get("prompts")), inputs, shard=shard)
    return directory_of(inputs)


def inputs_of(cfg: Recipe, sources: Mapping[str, Path]) -> dict[str, Any]:
    """What the pairs of a recipe depend on."""
    assert cfg.init is not None
    return {
        "teacher": {"backbone": cfg.backbone, "sha256": identity(sources["student"], cfg.init), "precision": cfg.precision and cfg.precision.student},
        "solver": strict.as_plain(cfg.data.pair_sampler),
        "timesteps": list(timesteps(cfg.sampler)),
        "latents": cfg.latents,
        "pairs": cfg.data.pairs,
        "seed": cfg.data.seed,
        "prompts_sha256": records.sha256_of(sources["prompts"]) if "prompts" in sources else None,
    }


def make(cfg: Recipe, teacher: Backbone, prompts: Prompts, inputs: dict[str, Any], *, shard: str | None = None) -> StoredPairs | None:
    """Solve those parts of a recipe's pairs that are not there yet; with `shard` "I/N" only every N-th from the I-th on.

    Returns:
        all pairs, or nothing while parts of other shards are missing.

    Raises:
        UserError: the solver does not pass the student's timesteps; the disk is full, or somebody else makes the same parts (code 1).
    """
    assert cfg.data.pairs is not None and cfg.data.pair_sampler is not None
    directory = directory_of(inputs)
    seeds = torch.randint(2**62, (cfg.data.pairs,), generator=torch.Generator().manual_seed(cfg.data.seed)).tolist()
    files = [directory / f"part_{number:05d}.safetensors" for number in range(-(-len(seeds) // PART))]
    mine = list(range(len(files))) if shard is None else shard_of(range(len(files)), shard)
    with provenance.session(directory, "pairs", directory.name, inputs, writer=shard and shard.replace("/", "of")) as run:
        if run.done and not all(path.is_file() for path in files):
            run.reopen()
        todo = [number for number in mine if not files[number].is_file()]
        with Progress("solving ODE pairs", len(mine), done=len(mine) - len(todo)) as progress:
            for number in todo:
                part = seeds[number * PART : (number + 1) * PART]
                path, captions = solve(teacher, cfg.sampler, cfg.data.pair_sampler, latents=cfg.latents, seeds=part, prompts=prompts)
                save(files[number], {"path": path}, {"captions": json.dumps(captions)})
                progress.advance()
        run.complete = all(path.is_file() for path in files)
        run.result["pairs"] = len(seeds)
    return StoredPairs(files, timesteps(cfg.sampler)) if run.complete else None


def directory_of(inputs: dict[str, Any]) -> Path:
    """Where the pairs lie."""
    return settings().runs / "pairs" / records.fingerprint(inputs)[:16]
