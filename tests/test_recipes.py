"""What a recipe may say about full-size training: prompts, rewards, precision, rollouts, the released trainer's steps; and what it lacks."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfbench import config, records
from rfbench.backbones.wan.dit import WanDiT
from rfbench.checkpointing import checkpointed
from rfbench.config import CacheCfg, OptimCfg, Recipe, RewardCfg, RolloutCfg
from rfbench.data import draw_prompts, prompts_of
from rfbench.errors import UserError
from rfbench.generate import generate
from rfbench.methods.base import METHODS, Batch
from rfbench.methods.dmd import Dmd
from rfbench.methods.redmd import ReDmd
from rfbench.recipes import check, files, inputs_of
from rfbench.registry import pick
from rfbench.reward import origin_of
from rfbench.scorers.base import SCORERS
from rfbench.settings import HOME
from rfbench.train import Trainer, train
from rfbench.updates import Updater
from tests import models
from tests.test_cli import call
from tests.test_generate import write_suite
from tests.test_methods import BATCH, DMD, REDMD, SCORES, gradients
from tests.test_train import ABOUT, OPTIM, recipe, tiny, write  # noqa: F401
from tests.tiny import Tiny, distance

SINK = CacheCfg("ema_sink", 6, 3, 0.5, "float32")


def brightness(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward of one's own."""
    return pixel_BTCHW.mean((1, 2, 3, 4))


def one_number(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward that forgets that there are several clips."""
    return pixel_BTCHW.mean()


def test_prompts_are_lines_of_a_file_that_seeds_choose(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red kite\na dog runs\nsnow\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red kite", "id": 1}\n{"prompt": "a dog runs"}\n{"prompt": "snow"}\n')
    found = prompts_of(tmp_path / "p.txt")(range(60))
    assert found == prompts_of(tmp_path / "p.jsonl")(range(60)) and found[7:9] == prompts_of(tmp_path / "p.txt")([7, 8])
    assert {prompt: 8 < found.count(prompt) < 35 for prompt in found} == {"a red kite": True, "a dog runs": True, "snow": True}
    assert prompts_of(None) is draw_prompts


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", "one\n\nthree\n", "line 2 is empty"),
        ("p.txt", "", "line 1 is empty"),
        ("p.csv", "one\n", "a .txt or a .jsonl file"),
        ("p.jsonl", '{"text": "one"}\n', "does not hold one prompt per line"),
        ("p.jsonl", "one\n", "does not hold one prompt per line"),
    ],
)
def test_a_file_without_a_prompt_per_line_is_refused(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        prompts_of(tmp_path / name)


def test_a_reward_may_be_a_function_of_ones_own() -> None:
    assert origin_of(RewardCfg("tests.test_recipes:brightness", beta=1.0)).open(16) is brightness
    method = ReDmd(replace(REDMD, reward=RewardCfg("tests.test_recipes:one_number", beta=1.0)), Tiny(), Tiny(seed=1))
    with pytest.raises(UserError, match=r"gave numbers of shape \[\] for 2 clips; it takes one for each") as raised:
        method.losses(BATCH, ("generator",))
    assert raised.value.code == 1
    for name, problem in (("nowhere:x", "No module named 'nowhere'"), ("tests.test_recipes:x", "no attribute 'x'"), ("math:pi", "not a function")):
        with pytest.raises(UserError, match=problem):
            origin_of(RewardCfg(name, beta=1.0)).open(16)


def test_a_reward_that_there_is_not_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name, problem in (("toy_motoin", "did you mean 'toy_motion'"), ("motion.sped", "has no metric 'sped'; did you mean 'speed'")):
        with pytest.raises(UserError, match=problem):
            check(replace(recipe(tmp_path, "redmd"), reward=RewardCfg(name, beta=1.0)))
    cfg = recipe(tmp_path, "redmd", reward={"name": "motion.speed", "beta": 1.0})
    sources = {role: tmp_path / one.file for role, one in files(cfg).items()}
    assert inputs_of(cfg, sources)["reward"] == pick(SCORERS, "motion", what="scorer").version


def test_the_code_of_ones_own_reward_is_an_input(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, "redmd", reward={"name": "tests.test_recipes:brightness", "beta": 1.0})
    sources = {role: tmp_path / one.file for role, one in files(cfg).items()}
    assert len(inputs_of(cfg, sources)["reward"]) == 64
    assert "reward" not in inputs_of(recipe(tmp_path, "redmd"), sources)


def test_rollouts_may_differ_from_the_sampler_as_in_the_release() -> None:
    """D-3 and D-32; with a noise of zero and the sampler's own cache nothing changes."""
    plain = replace(DMD, latents=12, sampler=replace(DMD.sampler, cache=SINK))
    found = {}
    for name, rollout in {
        "none": None,
        "same": RolloutCfg(cache=SINK, context_noise=0.0),
        "static": RolloutCfg(cache=CacheCfg("static_sink", 6, 3)),
        "noise": RolloutCfg(context_noise=0.3),
    }.items():
        method = Dmd(replace(plain, rollout=rollout), Tiny(), Tiny(seed=1))
        found[name] = method.losses(BATCH, ("critic",))[0]["critic"].detach()
    assert torch.equal(found["none"], found["same"])
    assert not torch.equal(found["none"], found["static"]) and not torch.equal(found["none"], found["noise"])
    with pytest.raises(UserError, match="'rollout' is 'cache' or 'context_noise' of streamed rollouts, or"):
        RolloutCfg()


def test_student_and_critic_may_have_rollouts_of_their_own() -> None:
    """The student's loss stays; the critic's is that of other clips."""
    shared = Dmd(DMD, Tiny(), Tiny(seed=1)).losses(BATCH, ("generator", "critic"))[0]
    method = Dmd(replace(DMD, scores=replace(SCORES, rollouts="separate")), Tiny(), Tiny(seed=1))
    losses, stats = method.losses(BATCH, ("generator", "critic"))
    assert torch.equal(losses["generator"], shared["generator"]) and not torch.equal(losses["critic"], shared["critic"])
    assert torch.equal(losses["critic"], method.losses(BATCH.other(), ("critic",))[0]["critic"])
    assert stats.keys() == {"loss", "matching_gradient", "timestep", "critic_loss", "critic_timestep"}


@pytest.mark.parametrize("kind", ["detached", "in_place"])
def test_activations_that_are_computed_anew_give_the_same_gradients(kind: Any) -> None:
    """Also where the cache has moved on since: four chunks, of which the sink and the chunk before are seen. And they are not kept."""
    found, kept = [], []
    for anew in (False, True):
        cfg = replace(DMD, latents=12, sampler=replace(DMD.sampler, cache=SINK), scores=replace(SCORES, cache_gradients=kind))
        method, size = Dmd(cfg, Tiny(), Tiny(seed=1)), list[int]()
        if anew:
            checkpointed(method.student.denoiser)
            checkpointed(method.critic)

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses, _ = method.losses(BATCH, ("generator", "critic"))
        sum(losses.values()).backward()  # type: ignore[union-attr]
        found.append({role: gradients(module) for role, module in method.modules.items()})
        kept.append(sum(size))
    assert all(distance(found[1][role], gradient) < 1e-6 for role, gradient in found[0].items())
    assert kept[1] < 0.5 * kept[0]


def test_weights_in_bfloat16_have_float32_copies() -> None:
    """Steps that bfloat16 would swallow add up, and so do gradients."""
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    updater = Updater(module, OptimCfg(1e-4, betas=(0.0, 0.0), clip=100.0))
    for _ in range(100):
        for gradient in (1.0, 2.0**-12):
            (gradient * module.weight).sum().backward()
            assert module.weight.grad is None
        assert updater.clip() == 1 + 2.0**-12
        updater.step(1.0)
        updater.clear()
    assert updater.masters[0].item() == pytest.approx(0.99, abs=1e-5) and module.weight.item() == torch.tensor(0.99).bfloat16().item()
    other = Updater(nn.Linear(1, 1, bias=False).to(torch.bfloat16), updater.cfg)
    saved, filled = updater.tensors(), other.tensors(primed=True)
    assert set(saved["optimiser"]["weight"]) == set(filled["optimiser"]["weight"]) == {"exp_avg", "exp_avg_sq"}
    assert set(saved["weights"]) == {"weight"}
    with torch.no_grad():
        for place, value in ((filled, saved), (filled["optimiser"], saved["optimiser"])):
            tensors = value["weights"] if "weights" in value else value["weight"]
            for name, tensor in tensors.items():
                (place["weights"] if "weights" in place else place["weight"])[name].copy_(tensor)
    other.go_on(updater.steps)
    assert [held["step"].item() for held in other.optimisers[0].state.values()] == [updater.steps] == [other.steps]
    assert torch.equal(other.masters[0], updater.masters[0]) and torch.equal(other.weights[0], module.weight)
    (exact,) = updater.exact(module.state_dict(keep_vars=True)).values()
    assert exact.dtype == torch.float32 and torch.equal(exact, updater.masters[0])
    plain = nn.Linear(1, 1)
    assert all(master is weight for master, weight in zip(Updater(plain, updater.cfg).masters, plain.parameters(), strict=True))


class Pulls:
    """Two weights that each clip pulls to a place of its own."""

    def __init__(self, recipe: Recipe, student: Any, teacher: Any, **more: Any) -> None:
        assert recipe.scores is not None
        self.every = recipe.scores.generator_every
        self.w = {role: nn.Parameter(torch.tensor([0.25])) for role in ("generator", "critic")}
        self.modules: dict[str, nn.Module] = {role: nn.ParameterList([w]) for role, w in self.w.items()}
        self.frozen: dict[str, WanDiT] = {}
        self.seen: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator", "critic") if step % self.every == 0 else ("critic",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.seen.append((batch.seeds, turns))
        return {role: (self.w[role] - places(batch.seeds)).square().mean() for role in turns}, {}


def places(seeds: tuple[int, ...]) -> Tensor:
    return torch.tensor([float(seed % 7) - 3 for seed in seeds])


def pulled(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Pulls:
    monkeypatch.setitem(METHODS, "dmd", "tests.test_recipes:Pulls")
    optim = {"lr": 0.1, "betas": [0.0, 0.0], "clip": 2.0}
    scores = {"teacher": {"file": "teacher.safetensors"}, "guidance": 2.0, "generator_every": 5, "critic_optim": optim, "score_shift": 8.0}
    cfg = recipe(folder, "dmd", optim=optim, scores=scores, log_every=1000, checkpoint_every=1000, stepping="as_released", **changes)
    trainer = Trainer(cfg, folder / "run", {"student": folder / "student.safetensors", "teacher": folder / "teacher.safetensors"})
    found = trainer.run(ABOUT)
    assert isinstance(trainer.method, Pulls)
    trainer.method.updates = found["updates"]  # type: ignore[attr-defined]
    return trainer.method


@pytest.mark.parametrize(
    ("accumulate", "generator", "critic", "parts"),
    [(1, 242, 1202, 121), (8, 32, 677, 16)],
)
def test_the_released_trainer_steps_as_often_as_was_counted(
    accumulate: int, generator: int, critic: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D-1: 601 iterations of the released loop."""
    method = pulled(tmp_path, monkeypatch, steps=601, batch=accumulate, accumulate=accumulate)
    assert method.updates == {"generator": generator, "critic": critic}  # type: ignore[attr-defined]
    assert sum("generator" in turns for _, turns in method.seen) == parts and len(method.seen) == 601


def test_the_released_trainer_steps_twice_and_on_stale_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: AdamW with betas (0, 0) steps by lr times the gradient's sign. Sums are clipped where they lie."""
    method = pulled(tmp_path, monkeypatch, steps=11, batch=4, accumulate=2)
    assert [len(seeds) for seeds, _ in method.seen] == [1] * 22  # a clip per GPU
    w, held = {"generator": 0.25, "critic": 0.25}, {"generator": 0.0, "critic": 0.0}
    for step in range(11):
        pair = method.seen[2 * step : 2 * step + 2]
        mean = sum(float(places(seeds)) for seeds, _ in pair) / 2
        for role in pair[0][1]:
            held[role] += 2 * (w[role] - mean) / 2
            held[role] = max(-2.0, min(2.0, held[role]))
            for _ in range(2 if step % 2 == 0 else 1):
                w[role] -= math.copysign(0.1, held[role])
            if step % 2 == 0:
                held[role] = 0.0
    assert {role: weight.item() for role, weight in method.w.items()} == pytest.approx(w, abs=1e-5)
    assert sum("generator" in turns for _, turns in method.seen) == 2 * 2  # iterations 0 and 10, two clips each


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("flow", {"rollout": {"context_noise": 0.1}}, "method 'flow' does not use 'rollout'"),
        ("flow", {"data": {"clips": 3, "drop_caption": 0.1, "prompts": {"file": "p.txt"}}}, "method 'flow' does not use 'data.prompts'"),
        ("flow", {"stepping": "as_released"}, "'stepping' is about a generator and a critic"),
        ("flow", {"precision": {"critic": "float32"}}, "leave 'precision.teacher' and 'precision.critic' out"),
        ("dmd", {"backbone": "wan2.1-1.3b"}, "give 'data.prompts'"),
        ("flow", {"backbone": "wan2.1-1.3b"}, "clips of the toy world can't train"),
        ("dmd", {"samples": {"every": 1, "prompts": [], "latents": 3}}, "'samples' needs a prompt"),
        ("dmd", {"precision": {"student": "bfloat16"}}, "backbone 'tiny' does not use 'precision'"),
    ],
)
def test_settings_that_would_not_be_used_are_refused(method: str, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train(write(tmp_path, method, **changes))


def test_a_teacher_of_another_size_is_no_start_for_the_critic(tmp_path: Path) -> None:
    scores = {"teacher": {"file": "teacher.safetensors"}, "guidance": 2.0, "generator_every": 5, "critic_optim": OPTIM, "score_shift": 8.0}
    with pytest.raises(UserError, match=r"a teacher on 'toy' can't be the critic's start; give 'scores.critic'"):
        train(write(tmp_path, "dmd", scores=scores | {"teacher_backbone": "toy"}))


@pytest.mark.parametrize("name", [name for name in config.names_of(Recipe) if name.startswith("wan/")])
def test_a_dry_run_names_everything_that_is_missing(name: str) -> None:
    with pytest.raises(UserError) as raised:
        train(name, dry_run=True)
    sentence, cfg = str(raised.value), config.load(Recipe, name)
    data = "latents" if cfg.data.latents else "prompts"
    wanted = {"student", data, "text", "tokenizer", "vae"} | ({"teacher"} if cfg.scores else set()) | ({"reward"} if cfg.reward else set())
    assert all(f"{role} (" in sentence for role in wanted) and "\n" not in sentence and raised.value.code == 2


def test_the_release_differs_from_the_paper_where_it_says_so() -> None:
    paper, code = (config.load(Recipe, f"wan/{name}") for name in ("reward-forcing", "reward-forcing-as-released"))
    assert paper.scores and code.scores and paper.reward and code.reward and code.rollout
    assert paper.steps == 600 and code.steps == 601 and paper.batch == code.batch == 64 and paper.stepping == "once"  # D-1, D-2
    assert code.rollout.cache and code.rollout.cache.policy == "static_sink" and paper.rollout is None  # D-3
    assert paper.scores.score_shift == 5 and code.scores.score_shift == 8  # D-33
    assert paper.scores.cache_gradients == "detached" and code.scores.cache_gradients == "in_place"  # D-34
    assert paper.reward.input is None and code.reward.input == "as_released" and paper.reward.beta == code.reward.beta == 0.5  # D-5 to D-8
    same = ("optim", "ema", "init", "data", "latents", "backbone")
    assert all(getattr(paper, field) == getattr(code, field) for field in same)


def test_a_job_of_an_array_makes_its_shard(tmp_path: Path) -> None:
    """The batch file with a stand-in for rfbench: every job of the array asks for another shard, and all for the same thing."""
    (tmp_path / "rfbench").write_text('#!/bin/bash\nprintf "%s " "$@"\n')
    (tmp_path / "rfbench").chmod(0o755)
    asked = []
    for job in range(3):
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": "3"}
        command = ["bash", str(HOME / "recipes" / "slurm-array.sbatch"), "self-forcing", "--suite", "smoke"]
        asked.append(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip())
    assert asked == [f"generate self-forcing --suite smoke --shard {number}/3" for number in (1, 2, 3)]


def test_the_nodes_of_a_job_train_one_recipe(
    tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch file with stand-ins for SLURM and the launcher; accelerate takes what each node tells it, and rfbench what it starts."""
    launch = pytest.importorskip("accelerate.commands.launch")
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames gpu[7-8]" ] && printf "gpu7\\ngpu8\\n"',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "accelerate": 'printf "%s\\n" "$@" >> told; echo . >> told',
    }
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    asked = ["toy/teacher", "optim.betas=[0.5, 0.9]", "--name", "spread"]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12"}
    command = ["bash", str(HOME / "recipes" / "slurm.sbatch"), *asked]
    subprocess.run(command, env=variables, cwd=tmp_path, check=True)
    nodes = [said.splitlines() for said in (tmp_path / "told").read_text().split("\n.\n") if said]
    assert len(nodes) == 2
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda *_: False)
    for number, (verb, *said) in enumerate(nodes):
        args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(said))
        launch.prepare_multi_gpu_env(args)
        assert verb == "launch" and args.multi_gpu and (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", number)
        assert (args.rdzv_backend, args.rdzv_endpoint, args.mixed_precision) == ("c10d", "gpu7:29500", "no")
        assert args.module and args.training_script == "rfbench.cli"
        assert args.training_script_args == ["train", *asked]
    assert call(capsys, *args.training_script_args, "--dry-run")[0] == 0


@pytest.fixture
def submitting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """recipes/slurm_array.py as somebody would call it, from a folder of its own; returns the jobs."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HOME))

    def call(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["slurm_array.py", *arguments])
        return runpy.run_path(str(HOME / "recipes" / "slurm_array.py"), run_name="__main__")["jobs"]

    return call


@pytest.mark.slow  # five new interpreters, two of which make clips
def test_submitted_jobs_make_the_clips_of_one_process(submitting: Callable[..., Any], tmp_path: Path, folders: Path) -> None:
    """submitit's jobs on a machine without SLURM."""
    student, suite = models.write(tmp_path), write_suite(tmp_path, samples=1)
    for job in submitting("2", student, "--suite", suite, "--name", "spread"):
        job.result()
    spread = folders / "runs" / "bench" / "spread" / "short"
    assert records.read_run(spread).status == "done"
    assert [path.name for path in records.clip_files(spread)] == ["clips.1of2.jsonl", "clips.2of2.jsonl"]
    assert records.read_clips(spread) == records.read_clips(generate(student, suite, name="alone"))


def test_slurm_is_asked_for_an_array_that_it_may_put_back(submitting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit with a stand-in for sbatch, which keeps the batch file that it is given; what its jobs do, and again when they are put back."""
    for name, says in (("sbatch", f'cp "$1" {tmp_path}/asked; echo Submitted batch job 12'), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    jobs = submitting("3", "self-forcing", "--suite", "smoke")
    assert [job.job_id for job in jobs] == ["12_0", "12_1", "12_2"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"#SBATCH --array=0-2%3", "#SBATCH --gpus-per-node=1", "#SBATCH --time=360", "#SBATCH --open-mode=append"} <= set(asked)
    shards = [job.submission().function for job in jobs]
    assert [shard.which for shard in shards] == ["1/3", "2/3", "3/3"]
    (tmp_path / "rfbench").mkdir()
    (tmp_path / "rfbench" / "cli.py").write_text("import sys; print(*sys.argv[1:], file=open('told', 'a'))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for shard in (shards[1], shards[1].checkpoint().function):
        shard()
    assert (tmp_path / "told").read_text() == "generate self-forcing --suite smoke --shard 2/3\n" * 2
