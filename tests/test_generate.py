"""Clips against a direct run of the sampler; the same clips from batches, shards and interrupted runs; refusals."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence
from safetensors.torch import save_file

from rfbench import attention, baselines, evaluate, filming, generate, proof, records, sampler, suites, video
from rfbench.errors import UserError
from rfbench.scorers.base import read_video
from rfbench.settings import settings
from tests import models

PROMPTS = ["a red disc moves right quickly", "a blue square", "a green triangle moves up then down", "a cyan disc moves left slowly"]

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from rfbench.cli import main; main(sys.argv[1:])"  # whoever imports it fails


def write_suite(folder: Path, name: str = "short", *, prompts: list[str] = PROMPTS, **fields: object) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"prompts": f"{name}.jsonl", "frames": 31, "samples": 2, "seed": 5} | fields))
    return str(folder / f"{name}.yaml")


@pytest.fixture
def student(tmp_path: Path) -> str:
    return models.write(tmp_path)


@pytest.fixture
def suite(tmp_path: Path) -> str:
    return write_suite(tmp_path)


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Everything in a run directory that must not depend on how it came about."""
    files = (path for path in sorted(directory.rglob("[!.]*")) if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def videos_of(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in bytes_of(directory).items() if name.startswith("videos/")}


def test_every_clip_of_the_suite_is_there_as_its_row_says(student, suite, folders):
    directory = generate.generate(student, suite)
    assert directory == folders / "runs" / "bench" / "student" / "short"
    clips, run = records.read_rows(directory / "clips.jsonl", records.Clip), records.read_run(directory)
    assert (run.verb, run.name, run.status, run.result) == ("generate", "student/short", "done", {"clips": 8})
    assert run.inputs["suite"]["sha256"] == suites.suite_sha256(suites.load_suite(suite))
    assert run.inputs["weights_sha256"] == records.sha256_of(Path(student).with_suffix(".safetensors"))
    assert [clip.id for clip in clips] == [f"{prompt:04d}-{sample}" for prompt in range(4) for sample in range(2)]
    for clip in clips:
        assert (clip.prompt, clip.generated_from) == (PROMPTS[clip.prompt_id],) * 2
        assert clip.seed == suites.clip_seed(5, clip.prompt_id, clip.sample)
        assert read_video(directory, clip).shape == (31, 48, 64, 3)
    assert len({clip.sha256 for clip in clips}) == 8


def test_a_video_shows_what_the_sampler_makes_of_its_seed(student, suite):
    """Latents of one clip alone, decoded at once instead of as a stream, cut to the asked length."""
    clip = records.read_clips(generate.generate(student, suite))[3]
    backbone, cfg = baselines.prepare(student).open(), baselines.prepare(student).cfg.sampler
    noise = sampler.clip_noise(backbone, [clip.seed])
    chunks = list(sampler.stream(backbone, backbone.encode_text([PROMPTS[1]]), 9, cfg, noise))
    pixels = backbone.decoder()(torch.cat([chunk.latent_BFCHW for chunk in chunks], 1))[0, :31]
    luma = np.array([0.299, 0.587, 0.114])  # colour is stored at half the resolution
    wanted = video.as_uint8(pixels[None])[0].numpy() @ luma
    shown = read_video(settings().runs / "bench" / "student" / "short", clip) @ luma
    gap = np.abs(shown - wanted).mean()
    assert gap < 2
    assert np.abs(shown - np.roll(wanted, 1, axis=0)).mean() > 3 * gap


def test_a_clip_is_the_same_in_any_batch_shard_and_suite_length(student, suite, folders):
    if not models.products_do_not_depend_on_their_rows():
        pytest.skip("on this machine a matrix product rounds differently with another number of rows")
    whole = generate.generate(student, suite)
    wanted = videos_of(whole)
    toml = folders / "rfbench.toml"
    toml.write_text(toml.read_text() + f"[fast]\ntokens = {36 * 3}\n")
    assert bytes_of(generate.generate(student, suite, name="threes")) == bytes_of(whole)
    toml.write_text(toml.read_text().replace("tokens = 108", "tokens = 1"))
    assert bytes_of(generate.generate(student, suite, name="single")) == bytes_of(whole)
    few = videos_of(generate.generate(student, suite, name="few", limit=2))
    assert few == {name: wanted[name] for name in few}
    assert len(few) == 4


def test_shards_make_the_same_run_together(student, suite):
    whole = generate.generate(student, suite)
    for part in ("3/3", "1/3"):
        parts = generate.generate(student, suite, name="parts", shard=part)
        assert records.read_run(parts).status == "running"
    generate.generate(student, suite, name="parts", shard="2/3")
    assert records.read_run(parts).status == "done"
    assert records.read_run(parts).result == {"clips": 8}
    assert [clip.id for clip in records.read_clips(parts)] == [clip.id for clip in records.read_clips(whole)]
    if models.products_do_not_depend_on_their_rows():
        assert records.read_clips(parts) == records.read_clips(whole)
        assert videos_of(parts) == videos_of(whole)
    # A lone writer that finds work takes over what shards have written.
    (parts / "videos" / "0002-1.mp4").unlink()
    generate.generate(student, suite, name="parts")
    assert [path.name for path in records.clip_files(parts)] == ["clips.jsonl"]
    if models.products_do_not_depend_on_their_rows():
        assert bytes_of(parts) == bytes_of(whole)


def test_a_shard_that_finds_anothers_video_broken_says_so(student, suite):
    generate.generate(student, suite, shard="1/2")
    directory = generate.generate(student, suite, shard="2/2")
    (directory / "videos" / "0000-0.mp4").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"clips\.1of2\.jsonl tells of is gone or was altered; run this again without --shard"):
        generate.generate(student, suite, shard="2/2")
    generate.generate(student, suite, shard="1/2")
    assert records.read_run(directory).status == "done"


def test_what_is_missing_or_broken_is_made_again_and_the_rest_is_left_alone(student, suite, monkeypatch):
    directory = generate.generate(student, suite)
    wanted, run = bytes_of(directory), (directory / "run.json").read_bytes()
    made: list[str] = []
    film = filming.film

    def counting(*arguments: Any) -> None:
        made.extend(path.stem for path in arguments[-1])
        film(*arguments)

    monkeypatch.setattr(filming, "film", counting)
    generate.generate(student, suite)
    assert made == []
    assert (directory / "run.json").read_bytes() == run

    (directory / "videos" / "0000-1.mp4").unlink()
    (directory / "videos" / "0002-0.mp4").write_bytes(wanted["videos/0002-0.mp4"][:-100])
    generate.generate(student, suite)
    assert made == ["0000-1", "0002-0"]
    if models.products_do_not_depend_on_their_rows():
        assert bytes_of(directory) == wanted

    made.clear()
    rows = wanted["clips.jsonl"].splitlines(keepends=True)
    (directory / "clips.jsonl").write_bytes(b"".join(rows[:5]) + rows[6] + rows[7][:20])  # one row lost, one torn
    generate.generate(student, suite)
    assert made == ["0002-1", "0003-1"]
    if models.products_do_not_depend_on_their_rows():
        assert bytes_of(directory) == wanted


def test_a_bidirectional_baseline_makes_the_length_that_is_asked_for(tmp_path, folders):
    teacher = models.write(tmp_path, "teacher", sampler=models.TEACHER, max_latents=9)
    directory = generate.generate(teacher, write_suite(tmp_path, frames=20, prompts=PROMPTS[:1]))
    assert [read_video(directory, clip).shape[0] for clip in records.read_clips(directory)] == [20, 20]
    with pytest.raises(UserError, match=r"baseline 'teacher' makes clips of at most 33 frames, but suite 'long' asks for 34"):
        generate.generate(teacher, write_suite(tmp_path, "long", frames=34))
    assert not (folders / "runs" / "bench" / "teacher" / "long").exists()


def test_no_more_than_a_chunk_of_pixels_is_held(student, tmp_path, monkeypatch):
    sizes: list[int] = []
    as_uint8 = video.as_uint8

    def noting(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(pixels.shape[1])
        return as_uint8(pixels)

    monkeypatch.setattr(video, "as_uint8", noting)
    generate.generate(student, write_suite(tmp_path, "long", frames=120, samples=1, prompts=PROMPTS[:1]))
    assert sizes == [9] + [12] * 9 + [3]


@pytest.mark.parametrize("prompt", ["../../x", "a red disc \N{GRINNING FACE}", "a red disc moves left slowly moves", "word " * 400])
def test_a_prompt_that_the_model_cannot_read_is_refused_before_there_is_anything(student, tmp_path, folders, prompt):
    suite = write_suite(tmp_path, "hostile", prompts=[*PROMPTS, prompt])
    with pytest.raises(UserError, match=r"suite 'hostile', prompt 4: prompt .* toy world") as caught:
        generate.generate(student, suite)
    assert caught.value.code == 2
    assert len(str(caught.value)) < 400
    assert not (folders / "runs").exists()


@pytest.mark.parametrize(("frames", "fps", "wanted"), [(13, 24, 9), (12, 24, 9), (5, 8, 9), (9, 16, 9)])
def test_a_suite_at_another_frame_rate_is_made_as_long_at_the_models_own(student, tmp_path, folders, frames, fps, wanted):
    directory = generate.generate(student, write_suite(tmp_path, "fast", fps=fps, frames=frames, samples=1), limit=1)
    (clip,) = records.read_clips(directory)
    assert (clip.frames, clip.fps) == (wanted, 16)
    assert (frames - 1) / fps <= (wanted - 1) / 16 < (frames - 1) / fps + 1 / 16
    with av.open(str(directory / clip.file)) as video:
        assert sum(1 for _ in video.decode(video=0)) == wanted and video.streams.video[0].average_rate == 16


def test_another_request_in_the_same_directory_is_refused_unless_fresh(student, suite):
    directory = generate.generate(student, suite, limit=1)
    with pytest.raises(UserError, match=r"other inputs \(baseline\.sampler\.cache\.alpha: 0\.9 -> 0\.5\)"):
        generate.generate(student, suite, ["sampler.cache.alpha=0.5"], limit=1)
    before = bytes_of(directory)
    generate.generate(student, suite, ["sampler.cache.alpha=0.5"], limit=1, fresh=True)
    assert records.read_run(directory).inputs["baseline"]["sampler"]["cache"]["alpha"] == 0.5
    assert sorted(bytes_of(directory)) == sorted(before)


def test_weights_that_are_not_fit_for_use_end_the_run_with_a_sentence(tmp_path, suite):
    tensors = dict(models.weights())
    tensors["denoiser.head.head.weight"] = tensors["denoiser.head.head.weight"] * 1e38
    wild = models.write(tmp_path, "wild", tensors=tensors)
    with pytest.raises(UserError, match=r"0000-0\.mp4: what the model made is not finite") as caught:
        generate.generate(wild, suite, name="wild")
    assert caught.value.code == 1
    directory = settings().runs / "bench" / "wild" / "short"
    assert records.read_run(directory).status == "failed"
    assert bytes_of(directory) == {"clips.jsonl": b""}


def test_a_full_disk_ends_the_run_with_a_sentence_and_it_goes_on_from_there(student, suite):
    whole = generate.generate(student, suite)
    size = min(len(content) for content in videos_of(whole).values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(UserError, match=r"could not write .*\.mp4: File too large; free space or fix permissions, then run it again") as caught:
            generate.generate(student, suite, name="full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == 1
    directory = settings().runs / "bench" / "full" / "short"
    assert records.read_run(directory).status == "failed"
    assert not videos_of(directory)
    assert bytes_of(generate.generate(student, suite, name="full")) == bytes_of(whole)


def test_a_dry_run_makes_nothing(student, suite, folders, capsys):
    assert generate.generate(student, suite, dry_run=True) == folders / "runs" / "bench" / "student" / "short"
    assert "8 clips of 31 frames" in capsys.readouterr().err
    assert not (folders / "runs").exists()


def test_ranks_that_were_launched_together_are_shards(student, suite, monkeypatch):
    alone = generate.generate(student, suite, name="alone")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        directory = generate.generate(student, suite, name="launched")
    assert {path.name for path in records.clip_files(directory)} == {f"clips.{rank}of3.jsonl" for rank in (1, 2, 3)}
    assert records.read_run(directory).status == "done" and videos_of(directory) == videos_of(alone)
    assert records.read_clips(directory) == records.read_clips(alone)
    with pytest.raises(UserError, match="--shard 1/2: this is one of 3 processes"):
        generate.generate(student, suite, name="launched", shard="1/2")


def test_a_run_that_is_whole_is_found_to_be_so_without_torch(student, suite, folders):
    """A run's whole command; what has to be made or was altered is still found."""
    directory = generate.generate(student, suite)
    evaluate.evaluate(directory, ["motion"])

    def told(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folders)
        return done.returncode, done.stderr

    asked, name = ("generate", student, "--suite", suite), "student/short"
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert told(*asked) == (0, "")
    assert told(*asked, "--dry-run") == (0, "8 clips of 31 frames, 8 rows are there\n")
    assert told("eval", name, "-s", "motion") == (0, "")
    for what in ("baselines", "suites", "studies"):
        assert told("list", what)[0] == 0
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    records.write_run(directory, dataclasses.replace(records.read_run(directory), status=records.RUNNING, result={}))
    assert told(*asked)[0] == 0 and records.read_run(directory).status == records.DONE, "nothing was left but to say so"
    assert records.read_run(directory).result == {"clips": 8}

    code, error = told(*asked, "sampler.shift=3")
    assert code == 2 and "holds a run with other inputs (baseline.sampler.shift: 5.0 -> 3.0)" in error
    Path(student).with_suffix(".safetensors").write_bytes(b"other weights")
    code, error = told(*asked)
    assert code == 2 and "weights_sha256" in error
    save_file(models.weights(), Path(student).with_suffix(".safetensors"))
    assert told(*asked) == (0, "")
    (directory / "videos" / "0001-0.mp4").write_bytes(b"another video")
    assert "import of torch halted" in told(*asked)[1], "there is something to make"


def test_who_goes_on_is_written_down_with_the_machine_as_torch_sees_it(student, suite):
    """A part is made here; the rest by processes that have not imported torch when they find the run."""
    directory = generate.generate(student, suite, shard="1/2")
    code = f"from rfbench.generate import generate; generate({student!r}, {suite!r}, shard='2/2')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    run = records.read_run(directory)
    assert run.status == records.DONE and "continued_on" not in run.recorded, "it is the same machine"
    assert run.recorded["machine"]["threads"] == 1


def test_a_trained_baseline_is_called_after_its_training(tmp_path):
    path = Path(models.write(tmp_path, "baseline", trained_by={"run": "study/student-s0", "code": {"commit": "abc"}}))
    ready = baselines.prepare(str(path))
    assert ready.name == "study/student-s0"
    other = models.write(tmp_path, "copy", trained_by={"run": "study/student-s0"})
    assert baselines.prepare(other).name == "copy"
    assert baselines.prepare(other, name="mine").name == "mine"


def test_a_sample_is_one_clip_of_one_seed(student, tmp_path):
    first = generate.sample(student, PROMPTS[0], seed=3, frames=20, out=tmp_path / "first.mp4").read_bytes()
    assert generate.sample(student, PROMPTS[0], seed=3, frames=20, out=tmp_path / "again.mp4").read_bytes() == first
    assert generate.sample(student, PROMPTS[0], seed=4, frames=20, out=tmp_path / "other.mp4").read_bytes() != first
    generate.sample(student, PROMPTS[0], seed=3, frames=20, out=tmp_path / "first.gif")
    with Image.open(tmp_path / "first.gif") as picture:
        assert len(list(ImageSequence.Iterator(picture))) == 20
    with pytest.raises(UserError, match="does not know the word 'purple'"):
        generate.sample(student, "a purple disc", seed=0, frames=20, out=tmp_path / "none.mp4")
    with pytest.raises(UserError, match=r"cannot be written as '\.png'"):
        generate.sample(student, PROMPTS[0], seed=0, frames=20, out=tmp_path / "none.png")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize("out", ["/proc/x.mp4", "/proc/new/x.mp4", "{folder}", "{folder}/student.yaml/x.mp4"])
def test_a_sample_that_cannot_be_written_is_refused_before_it_is_made(student, tmp_path, out):
    """Without torch, so before any work; nothing is made on the way there."""
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", WITHOUT_TORCH, "sample", student, PROMPTS[0], "--out", out.format(folder=tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --out ") and done.stderr.endswith("name another place\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_switches_on_the_way_and_leaves_what_was_before(student, tmp_path):
    def shown(name: str, then: list[str]) -> np.ndarray:
        path = generate.sample(student, PROMPTS[0], then=then, seed=3, frames=57, out=tmp_path / f"{name}.gif")
        with Image.open(path) as picture:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])

    # one second is pixel frame 16, in latent frame 4: the chunk of latent frames 6 to 8 is the first that starts there or later
    plain, switched = shown("plain", []), shown("switched", [f"1={PROMPTS[1]}"])
    assert (plain[:21] == switched[:21]).all() and (plain[21:] != switched[21:]).any()
    for then, sentence in (
        (["1"], r"--then '1': write SECONDS=PROMPT"),
        ([f"9={PROMPTS[1]}"], r"within the clip's 3\.6 seconds"),
        ([f"2={PROMPTS[1]}", f"1={PROMPTS[0]}"], "order the prompts by their time"),
        (["1=a purple disc"], "does not know the word 'purple'"),
    ):
        with pytest.raises(UserError, match=sentence):
            generate.sample(student, PROMPTS[0], then=then, seed=3, frames=57, out=tmp_path / "none.mp4")
    with pytest.raises(UserError, match="does not go chunk by chunk"):
        generate.sample("toy/teacher", PROMPTS[0], then=[f"1={PROMPTS[1]}"], seed=3, frames=57, out=tmp_path / "none.mp4")


def test_a_sample_goes_on_from_given_frames(student, tmp_path):
    """Two clips of other prompts that go on from the same frames begin alike, with what was given, and end differently."""

    def shown(path: Path) -> np.ndarray:
        return video.read(path)[0].astype(float)

    first = generate.sample(student, PROMPTS[0], seed=3, frames=33, out=tmp_path / "first.mp4")
    one, other = (
        generate.sample(student, prompt, given=first, seed=4, frames=33, out=tmp_path / f"{name}.mp4")
        for name, prompt in zip("ab", PROMPTS, strict=False)
    )
    given, ours, theirs = shown(first), shown(one), shown(other)
    assert np.abs(ours[:21] - given[-21:]).mean() < np.abs(ours[:21] - given[:21]).mean() / 2
    assert np.abs(ours[:20] - theirs[:20]).mean() < np.abs(ours[21:] - theirs[21:]).mean() / 2
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "one.png")
    Image.fromarray(np.zeros((50, 64, 3), np.uint8)).save(tmp_path / "large.png")
    for path, frames, sentence in (
        (tmp_path / "one.png", 33, "a chunk of the model is 9 frames, the file has 1"),
        (tmp_path / "large.png", 33, r"it is 64x50 at .* the model's are 64x48 at 16; convert it"),
        (first, 9, "it needs one to begin with and another to make"),
        (tmp_path / "none.mp4", 33, "not a video or an image that can be read"),
        (Path(__file__), 33, "not a video or an image that can be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            generate.sample(student, PROMPTS[0], given=path, seed=4, frames=frames, out=tmp_path / "no.mp4")
    with pytest.raises(UserError, match="cannot go on from given frames"):
        generate.sample("toy/teacher", PROMPTS[0], given=first, seed=3, frames=33, out=tmp_path / "no.mp4")


def test_a_shortcut_that_fails_while_clips_are_made_is_recorded(tmp_path, suite, monkeypatch):
    left_out = dict[str, str]()
    monkeypatch.setattr(proof, "left_out", left_out)
    film = filming.film

    def fails(*given: Any, **options: Any) -> None:
        left_out["joint"] = "gives other bits"
        film(*given, **options)

    directory = generate.generate(models.write(tmp_path), suite)
    plain = records.read_run(directory).recorded
    monkeypatch.setattr(filming, "film", fails)
    found = records.read_run(generate.generate(models.write(tmp_path), suite, fresh=True)).recorded
    assert "left_out" not in plain and found["left_out"] == {"joint": "gives other bits"}
    assert [name for name in plain["shortcuts"] if name != "joint"] == found["shortcuts"] != plain["shortcuts"]


def test_what_is_told_about_a_baseline_may_change_without_making_its_clips_again(tmp_path, suite):
    def made(title: str):
        name = models.write(tmp_path, "student", title=title)
        directory = generate.generate(name, suite)
        return directory, records.read_run(directory)

    directory, first = made("A name")
    before = {path.name: path.stat().st_mtime_ns for path in (directory / "videos").iterdir()}
    _, second = made("A better name")
    assert (first.recorded["baseline"]["title"], second.recorded["baseline"]["title"]) == ("A name", "A better name")
    assert first.fingerprint == second.fingerprint and {path.name: path.stat().st_mtime_ns for path in (directory / "videos").iterdir()} == before


@pytest.mark.parametrize(
    ("asked", "told"), [("attention = 'cudnn'", "attention 'cudnn' needs"), ("shortcuts = { graphs = true }", "shortcut 'graphs' is for")]
)
def test_what_this_machine_cannot_do_comes_out_before_there_is_a_run(asked, told, tmp_path, monkeypatch):
    (tmp_path / "rfbench.toml").write_text(f"[fast]\n{asked}\n[paths]\nruns = 'runs'\n")
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    monkeypatch.setattr(baselines, "device", lambda: torch.device("cpu"))
    attention.kernel.cache_clear()
    with pytest.raises(UserError, match=told):
        generate.generate("toy/ode-init", "smoke", random_weights=True)
    assert not (tmp_path / "runs").exists()
