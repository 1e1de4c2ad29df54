"""ODE pairs on disk: the same from shards, from interrupted runs and for every training; Self Forcing's LMDB; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rfbench import config, pairs, recipes, train
from rfbench.backbones.base import BACKBONES
from rfbench.config import Recipe
from rfbench.errors import UserError
from rfbench.methods.base import Draws
from rfbench.methods.ode import solve
from rfbench.records import read_run
from rfbench.sampler import timesteps
from rfbench.settings import settings
from tests.test_train import RECIPES, SCORES, STUDENT, write
from tests.tiny import Tiny

STEPS = 2  # of the student


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "tiny", "tests.tiny:Tiny")
    monkeypatch.setattr(pairs, "PART", 2)


def recipe_of(path: str) -> tuple[Recipe, dict[str, Any]]:
    cfg = config.load(Recipe, path)
    return cfg, pairs.inputs_of(cfg, recipes.locate(cfg, Path(path)))


def parts(directory: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["path"] for path in sorted(directory.glob("part_*.safetensors"))}


def data(count: int = 5) -> dict[str, Any]:
    return RECIPES["ode"]["data"] | {"pairs": count}


def test_shards_make_what_one_makes_and_whoever_trains_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "ode", data=data())
    cfg, inputs = recipe_of(path)
    directory = pairs.solve_all(path, shard="2/2")
    assert directory == pairs.directory_of(inputs) and list(parts(directory)) == ["part_00001.safetensors"]
    assert read_run(directory).status == "running"
    pairs.solve_all(path, shard="1/2")
    assert read_run(directory).status == "done" and read_run(directory).result == {"pairs": 5}
    sharded = parts(directory)
    assert [len(part) for part in sharded.values()] == [2, 2, 1]

    seeds = torch.randint(2**62, (5,), generator=torch.Generator().manual_seed(cfg.data.seed)).tolist()
    assert cfg.data.pair_sampler is not None
    teacher = Tiny(seed=10)
    whole, captions = solve(teacher, cfg.sampler, cfg.data.pair_sampler, latents=6, seeds=seeds)
    assert torch.allclose(torch.cat(list(sharded.values())), whole, atol=1e-5)

    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("these pairs are there")

    monkeypatch.setattr(pairs, "solve", unwanted)
    found = pairs.of(cfg, teacher, lambda seeds: [], recipes.locate(cfg, Path(path)))
    draws = Draws(teacher.shape, [1, 2, 3, 4, 5, 6])
    numbers = Draws(teacher.shape, [1, 2, 3, 4, 5, 6]).integers(5)
    path_BSFCHW, told = found.pick(draws)
    assert torch.allclose(path_BSFCHW, whole[numbers], atol=1e-5) and told == [captions[number] for number in numbers]
    assert found.timesteps == timesteps(cfg.sampler)
    train.train(path)
    assert len(list((settings().runs / "pairs").iterdir())) == 1


def test_a_part_that_is_gone_is_made_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "ode", data=data())
    directory = pairs.solve_all(path)
    before, calls = parts(directory), list[list[int]]()
    (directory / "part_00001.safetensors").unlink()

    def counted(*given: Any, seeds: list[int], **options: Any) -> Any:
        calls.append(seeds)
        return solve(*given, seeds=seeds, **options)

    monkeypatch.setattr(pairs, "solve", counted)
    assert pairs.solve_all(path) == directory
    assert len(calls) == 1 and read_run(directory).status == "done"
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts(directory).items()) and len(before) == 3


@pytest.mark.parametrize("change", [{"latents": 3}, {"data": data(6)}, {"data": data() | {"seed": 9}}, {"sampler": STUDENT | {"steps": [1000]}}])
def test_other_pairs_lie_elsewhere(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _, one = recipe_of(write(tmp_path, "ode", data=data()))
    _, other = recipe_of(write(tmp_path / "other", "ode", **{"data": data()} | change))
    _, trained_longer = recipe_of(write(tmp_path, "ode", data=data(), steps=99))
    assert pairs.directory_of(one) != pairs.directory_of(other) and pairs.directory_of(one) == pairs.directory_of(trained_longer)


def write_lmdb(file: Path, latents: np.ndarray, prompts: list[str], *, rows: int | None = None, shape: bool = True) -> Path:
    """As Self Forcing's scripts write it: rows as bytes of float16, the sizes of all as text."""
    with lmdb.open(str(file), subdir=False, map_size=2**24) as store, store.begin(write=True) as writing:
        for number, (row, prompt) in enumerate(zip(latents, prompts, strict=True)):
            if rows is None or number < rows:
                writing.put(f"latents_{number}_data".encode(), row.astype(np.float16).tobytes())
                writing.put(f"prompts_{number}_data".encode(), prompt.encode())
        if shape:
            writing.put(b"latents_shape", " ".join(map(str, latents.shape)).encode())
    return file


@pytest.fixture
def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, STEPS + 1, 6, 3, 4, 6)).astype(np.float16)


PROMPTS = ["a red disc", "a blue square", "a green disc", "ein grüner Drachen"]


def test_published_pairs_are_read_as_they_were_written(latents: np.ndarray, tmp_path: Path) -> None:
    file = write_lmdb(tmp_path / "data.mdb", latents, PROMPTS)
    found, shape = pairs.LmdbPairs(file, (1000.0, 500.0), frames=6), Tiny().shape
    path, captions = found.pick(Draws(shape, range(9)))
    numbers = Draws(shape, range(9)).integers(4)
    assert len(set(numbers)) > 2 and captions == [PROMPTS[number] for number in numbers]
    assert path.dtype == torch.float32 and (path.numpy() == latents[numbers]).all()
    ends, _ = found.ends(Draws(shape, range(9)))
    assert (ends.numpy() == latents[numbers][:, -1]).all()
    clean = pairs.LmdbPairs(write_lmdb(tmp_path / "clean.mdb", latents[:, -1], PROMPTS), (), frames=6)
    assert torch.equal(clean.ends(Draws(shape, range(9)))[0], ends)


def test_students_train_on_published_latents(latents: np.ndarray, tmp_path: Path) -> None:
    write_lmdb(tmp_path / "pairs.mdb", latents, [*PROMPTS[:3], "a cyan disc"])
    write_lmdb(tmp_path / "clean.mdb", latents[:, -1], [*PROMPTS[:3], "a cyan disc"])
    ode = train.train(write(tmp_path, "ode", data={"latents": {"file": "pairs.mdb"}}, steps=2))
    assert not (settings().runs / "pairs").exists() and len(read_run(ode).inputs["files"]["latents"]) == 64
    forced = {"rollout": {"student": "diffusion_forced"}, "data": {"latents": {"file": "clean.mdb"}}, "scores": SCORES}
    assert read_run(train.train(write(tmp_path, "dmd", steps=2, **forced))).status == "done"


def test_what_is_no_such_database_is_refused(latents: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "text.mdb").write_text("not a database")
    cases = {
        tmp_path / "text.mdb": "is not an LMDB database",
        write_lmdb(tmp_path / "shapeless.mdb", latents, PROMPTS, shape=False): "has no 'latents_shape'",
        write_lmdb(tmp_path / "flat.mdb", latents[:, 0, 0], PROMPTS): "'latents_shape' has 4 sizes",
        write_lmdb(tmp_path / "longer.mdb", latents[:, :2], PROMPTS): "holds 2 entries of 6 latent frames for each clip; the recipe takes 3 of 6",
    }
    for file, sentence in cases.items():
        with pytest.raises(UserError, match=sentence):
            pairs.LmdbPairs(file, (1000.0, 500.0), frames=6)
    torn = pairs.LmdbPairs(write_lmdb(tmp_path / "torn.mdb", latents, PROMPTS, rows=0), (1000.0, 500.0), frames=6)
    with pytest.raises(UserError, match=r"row . is missing or too short") as raised:
        torn.pick(Draws(Tiny().shape, [1]))
    assert raised.value.code == 1


def test_a_recipe_without_pairs_has_none_to_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="has no pairs to make: its method is 'dmd'"):
        pairs.solve_all(write(tmp_path, "dmd"))
    directory = pairs.solve_all(write(tmp_path, "ode", data=data()), dry_run=True)
    assert "5 pairs in 3 parts, 0 parts are there" in capsys.readouterr().err and not directory.exists()
