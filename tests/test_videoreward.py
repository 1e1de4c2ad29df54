"""VideoReward against transformers, PEFT and PIL; its checkpoint, tokenizer and settings as published, at a tiny size; scorer and reward."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from rfbench import cli, doctor, evaluate, records, world
from rfbench.config import RewardCfg
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.registry import pick
from rfbench.reward import REWARDS, origin_of, toy_motion
from rfbench.scorers.base import SCORERS, Metric, read_video
from rfbench.scorers.videoreward import TOKENS, batches
from rfbench.videoreward import frames, model
from rfbench.videoreward.model import ABOUT, ASKED, AXES, TOKENIZER, VIDEO, WEIGHTS, VideoReward
from rfbench.videoreward.network import ADAPTED, LORA, UNUSED, Tokens, VideoRewardCfg, empty_network, load_network, our_name, qwen_config
from tests import fake_runs, hostile
from tests.filming import answered, pixels, save
from tests.tiny import distance, normal

WORDS = ("<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", VIDEO, *ASKED, "red", "blue", "fox", "rate")
ID = {word: number for number, word in enumerate(WORDS)}
TOKEN_IDS = Tokens(ID["<|vision_start|>"], ID["<|vision_end|>"], ID["<|image_pad|>"], ID[VIDEO], 0, tuple(ID[word] for word in ASKED))
TINY = VideoRewardCfg(
    hidden=16,
    inter=24,
    layers=2,
    heads=2,
    kv_heads=1,
    mrope=(1, 1, 2),
    vocab=len(WORDS),
    vision_depth=1,
    vision_dim=16,
    vision_heads=2,
    vision_ratio=2,
    rank=3,
    alpha=6.0,
    tokens=TOKEN_IDS,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "data_config": {
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
        "fps": 2.0,
        "max_frame_pixels": 200704,
    },
    "training_args": {"learning_rate": 1e-5},
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "use_rslora": False, "lora_r": 3, "lora_alpha": 6},
    "inference_config": {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": 1.0, "MQ_std": 0.25, "TA_mean": 0.25, "TA_std": 0.5},
}


# A tiny model as PEFT wraps and saves it


def peft_model() -> Any:
    """transformers' own model with PEFT's own adapters and a head beside them, all of it random."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    whole = Qwen2VLForConditionalGeneration(qwen_config(TINY))
    whole.rm_head = torch.nn.Linear(TINY.hidden, 1, bias=False)
    targets = r".*language_model\.layers\.\d+\.(" + "|".join(re.escape(part) for part in ADAPTED) + ")"
    wrapped: Any = get_peft_model(whole, LoraConfig(r=TINY.rank, lora_alpha=int(TINY.alpha), target_modules=targets))
    with torch.no_grad():
        for number, parameter in enumerate(wrapped.parameters()):
            parameter.copy_(0.2 * normal(*parameter.shape, seed=number) + (1.0 if parameter.ndim == 1 else 0.0))
    return wrapped.eval()


def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers had before 4.52."""
    wrapper = "base_model.model."
    older = {f"{wrapper}model.language_model.": f"{wrapper}model.", f"{wrapper}model.visual.": f"{wrapper}visual."}
    found = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in older if name.startswith(prefix)), None)
        found[older[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    return found


@pytest.fixture(scope="module")
def original() -> Any:
    return peft_model()


@pytest.fixture(scope="module")
def published(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published repository, tiny: settings, weights, tokenizer."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    where = tmp_path_factory.mktemp("published")
    (where / WEIGHTS).parent.mkdir()
    (where / TOKENIZER).parent.mkdir()
    (where / ABOUT).write_text(json.dumps(SETTINGS))
    torch.save(as_published({name: tensor.detach().clone() for name, tensor in original.state_dict().items()}), where / WEIGHTS)
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS if word.startswith("<|")])
    tokenizer.save(str(where / TOKENIZER))
    return where


@pytest.fixture(scope="module")
def judge(published: Path) -> VideoReward:
    return model.load(published, dtype=torch.float32, cfg=TINY)


@pytest.fixture
def installed(published: Path, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny repository where the published one belongs, and its sizes in place of the published ones."""
    where = folders / "weights" / model.REPOSITORY
    where.parent.mkdir(parents=True)
    where.symlink_to(published)
    monkeypatch.setattr(model, "VideoRewardCfg", lambda: TINY)
    return where


def video(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def seen(count: int, height: int = 56, width: int = 84, seed: int = 0) -> Tensor:
    return frames.resized(video(count, seed=seed), (height, width))


# The network


def test_the_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    """All 1123 tensors, at full size, and every one of the network's has its place there."""
    about = json.loads((Path(__file__).parent / "golden" / "keys" / "videoreward_model_pth.json").read_text())["tensors"]
    cfg = VideoRewardCfg()
    own = {name: list(tensor.shape) for name, tensor in empty_network(cfg, torch.bfloat16).state_dict().items()}
    base: dict[str, list[int]] = {}
    sides: dict[str, list[int]] = {}
    for name, shape in about:
        if name != UNUSED:
            ours = our_name(name)
            assert ours is not None
            (sides if LORA.fullmatch(ours) else base)[ours] = shape
    assert base == own
    assert len(base) + len(sides) + 1 == len(about) == 1123
    weights = [f"qwen.language_model.layers.{layer}.{part}" for layer in range(cfg.layers) for part in ADAPTED]
    wanted = {f"{name}.lora_A.default.weight": [cfg.rank, own[f"{name}.weight"][1]] for name in weights}
    wanted |= {f"{name}.lora_B.default.weight": [own[f"{name}.weight"][0], cfg.rank] for name in weights}
    assert sides == wanted


@pytest.mark.parametrize("naming", ["old", "new"])
def test_scores_are_those_of_transformers_with_unmerged_adapters(original: Any, tmp_path: Path, naming: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in original.state_dict().items()}
    torch.save(as_published(tensors) if naming == "old" else tensors, tmp_path / "model.pth")
    network = load_network(tmp_path / "model.pth", TINY, torch.float32)
    patch_N, grid = frames.patches(seen(4))
    ids_BL = torch.tensor([[1, 3, *[ID[VIDEO]] * 12, 4, *TINY.tokens.scores[::-1], 10, 2]])
    one_BL = torch.ones_like(ids_BL)
    position_3BL = torch.arange(ids_BL.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        hidden = original.base_model.model.model(
            input_ids=ids_BL, attention_mask=one_BL, position_ids=position_3BL, pixel_values_videos=patch_N, video_grid_thw=torch.tensor([grid])
        ).last_hidden_state
        wanted = original.base_model.model.rm_head(hidden[:, 15:18])[..., 0]
        found = network(ids_BL, one_BL, patch_N, torch.tensor([grid]))
        assert distance(found, wanted) < 1e-6  # in order of appearance, here TA first
        with original.disable_adapter():
            plain = original.base_model.model.model(
                input_ids=ids_BL, position_ids=position_3BL, pixel_values_videos=patch_N, video_grid_thw=torch.tensor([grid])
            ).last_hidden_state
        assert distance(original.base_model.model.rm_head(plain[:, 15:18])[..., 0], wanted) > 0.01  # the adapters are part of it


def test_adapters_alone_over_their_base_are_the_same_network(original: Any, published: Path, folders: Path, tmp_path: Path) -> None:
    """As PEFT saves them, with the head beside them, over a base model whose embeddings are longer than the tokenizer."""
    where, base = tmp_path / "repository", folders / "weights" / model.BASE
    (where / TOKENIZER).parent.mkdir(parents=True)
    for file in (ABOUT, TOKENIZER):
        (where / file).write_bytes((published / file).read_bytes())
    original.save_pretrained(where / "checkpoint-11352")
    whole = {name: tensor.detach() for name, tensor in original.state_dict().items()}
    head, embeddings = "base_model.model.rm_head.weight", "base_model.model.model.language_model.embed_tokens.weight"
    torch.save({head: whole[head]}, where / model.BESIDE)
    bare = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in whole.items() if ".lora_" not in name}
    base.mkdir(parents=True)
    longer = torch.cat([whole[embeddings], torch.ones(5, TINY.hidden)])
    del bare["rm_head.weight"], bare["lm_head.weight"]
    save_file(bare | {embeddings.removeprefix("base_model.model."): longer}, base / "model.safetensors")

    wanted = load_network(published / WEIGHTS, TINY, torch.float32).state_dict()
    found = model.load(where, dtype=torch.float32, cfg=TINY).network.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert set(model.files(where)) == {ABOUT, model.ADAPTER, model.BESIDE, TOKENIZER, f"{model.BASE}/model.safetensors"}
    trained = whole[embeddings] + 1  # what training changed takes the place of the base's, in either naming
    torch.save({head: whole[head], embeddings.replace("language_model.", ""): trained}, where / model.BESIDE)
    found = model.load(where, dtype=torch.float32, cfg=TINY).network.state_dict()
    assert torch.equal(found["qwen.language_model.embed_tokens.weight"], trained)
    torch.save({}, where / model.BESIDE)
    with pytest.raises(UserError, match=r"lacks 1 tensor\(s\), first 'rm_head.weight'"):
        model.load(where, dtype=torch.float32, cfg=TINY)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        model.load(where, dtype=torch.float32, cfg=TINY)
    base.rmdir()
    with pytest.raises(UserError, match=r"run `hf download Qwen/Qwen2-VL-2B-Instruct"):
        model.load(where, dtype=torch.float32, cfg=TINY)


def test_weights_of_bfloat16_are_merged_in_float32(original: Any, tmp_path: Path) -> None:
    """Rounded once, and only when the network is bfloat16 itself."""
    tensors = as_published({name: tensor.detach().bfloat16() for name, tensor in original.state_dict().items()})
    torch.save(tensors, tmp_path / "model.pth")
    name = "base_model.model.model.layers.1.mlp.down_proj"
    matrix, down, up = (tensors[f"{name}.{part}.weight"].float() for part in ("base_layer", "lora_A.default", "lora_B.default"))
    wanted = matrix + TINY.alpha / TINY.rank * up @ down
    for dtype in (torch.float32, torch.bfloat16):
        merged = load_network(tmp_path / "model.pth", TINY, dtype).state_dict()["qwen.language_model.layers.1.mlp.down_proj.weight"]
        assert merged.dtype == dtype
        assert torch.allclose(merged, wanted.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("no head", r"lacks 1 tensor\(s\), first 'rm_head.weight'"),
        ("no adapters", r"adapters of 0 layers instead of 14"),
        ("an adapter less", r"adapters of 13 layers instead of 14, and 'qwen.language_model.layers.1.mlp.up_proj'"),
        ("half an adapter", r"lacks its half A"),
        ("another rank", r"not rank 3"),
        ("a stranger", r"it has 'base_model.model.value_head.weight'"),
        ("not PEFT's", r"it has 'visual."),
        ("NaN", r"NaN or infinity in 1 tensor\(s\), first 'rm_head.weight'"),
        ("another size", r"another shape of 1 tensor\(s\), first 'qwen.language_model.norm.weight'"),
        ("truncated", "not a readable checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_in_one_sentence(published: Path, tmp_path: Path, damage: str, sentence: str) -> None:
    tensors = torch.load(published / WEIGHTS, weights_only=True)
    part, path = "base_model.model.model.layers.1.mlp.up_proj", tmp_path / "model.pth"
    if damage == "no head":
        del tensors["base_model.model.rm_head.weight"]
    elif damage == "no adapters":
        tensors = {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items() if ".lora_" not in name}
    elif damage == "an adapter less":
        del tensors[f"{part}.lora_A.default.weight"], tensors[f"{part}.lora_B.default.weight"]
    elif damage == "half an adapter":
        del tensors[f"{part}.lora_A.default.weight"]
    elif damage == "another rank":
        tensors |= {f"{part}.lora_A.default.weight": torch.zeros(2, 16), f"{part}.lora_B.default.weight": torch.zeros(24, 2)}
    elif damage == "a stranger":
        tensors["base_model.model.value_head.weight"] = torch.zeros(1)
    elif damage == "not PEFT's":
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in sorted(tensors.items(), reverse=True)}
    elif damage == "NaN":
        tensors["base_model.model.rm_head.weight"][0, 3] = math.nan
    elif damage == "another size":
        tensors["base_model.model.model.norm.weight"] = torch.ones(8)
    torch.save(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=sentence) as caught:
        load_network(path, TINY, torch.float32)
    assert caught.value.code == 2 and "\n" not in str(caught.value)


def test_a_clip_scores_alike_alone_and_among_others(judge: VideoReward) -> None:
    """Clips of other sizes and lengths, prompts of other lengths: the padding does not show."""
    videos = [seen(4), seen(7, 84, 56, seed=1), seen(2, 28, 28, seed=2)]
    prompts = ["a red fox", "blue " * 40, ""]
    together = judge.raw(videos, prompts)
    assert together.shape == (3, 3) and together.dtype == torch.float32
    for number, (one, prompt) in enumerate(zip(videos, prompts, strict=True)):
        assert distance(together[number], judge.raw([one], [prompt])[0]) < 1e-5
    mean, std = torch.tensor([0.5, 1.0, 0.25]), torch.tensor([2.0, 0.25, 0.5])
    assert torch.allclose(judge.score(videos, prompts) * std + mean, together, atol=1e-5)
    assert distance(together[0], judge.raw(videos[:1], ["blue"])[0]) > 1e-3  # prompt and video count
    assert distance(together[0], judge.raw([seen(4, seed=5)], prompts[:1])[0]) > 1e-3


# The question


def test_the_video_stands_in_the_question_once_per_token(judge: VideoReward) -> None:
    ids = judge.ids("a {red} fox", 5)
    place = ids.index(ID[VIDEO])
    assert ids[place - 1 : place + 6] == [ID["<|vision_start|>"], *[ID[VIDEO]] * 5, ID["<|vision_end|>"]]
    assert [one for one in ids if one in TINY.tokens.scores] == list(TINY.tokens.scores)
    assert "Textual prompt - a {red} fox\n" in model.question("a {red} fox")


@pytest.mark.parametrize("word", [VIDEO, *ASKED])
def test_a_prompt_cannot_answer_for_the_model(judge: VideoReward, word: str) -> None:
    with pytest.raises(UserError, match="contains a special token of VideoReward"):
        judge.raw([seen(4)], [f"a red fox {word}"])


# Frames


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sizes_are_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(UserError, match="differ by at most 200 times"):
            frames.fitted_size(height, width)
        return
    found = frames.fitted_size(height, width)
    assert found == tuple(smart_resize(height, width, 28, frames.MIN_PIXELS, frames.MAX_PIXELS))
    assert frames.MIN_PIXELS <= math.prod(found) <= frames.MAX_PIXELS


@given(st.integers(2, 3000), st.sampled_from([8.0, 15.99, 16.0, 24.0, 60.0]), st.sampled_from([0.5, 2.0, 16.0]))
def test_frames_are_sampled_evenly_from_the_first_to_the_last(total: int, video_fps: float, fps: float) -> None:
    found = frames.sampled_frames(total, video_fps, fps)
    assert found[0] == 0 and found[-1] == total - 1 and len(found) % 2 == 0
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    if 4 <= total / video_fps * fps <= min(total, 768) // 2 * 2:
        assert abs(len(found) - total / video_fps * fps) <= 1


def test_a_single_frame_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 frames") as caught:
        frames.as_file(video(1), video_fps=16, fps=2)
    assert caught.value.code == 1


@pytest.mark.parametrize("size", [(336, 588), (56, 84)])
def test_frames_are_resized_as_pil_does(size: tuple[int, int]) -> None:
    """Its bicubic filter is antialiased too; of bytes it rounds the weights, and between its two passes."""

    def by_pil(frame_TCHW: Tensor) -> Tensor:
        planes = [Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for plane in frame_TCHW.flatten(0, 1)]
        return torch.from_numpy(np.stack([np.asarray(plane, np.float32) for plane in planes])).view(-1, 3, *size)

    clip = video(2, 100, 160)
    assert distance(frames.resized(clip.float(), size), by_pil(clip.float())) < 1e-5
    found = frames.resized(clip, size)
    grey = clip // 2 + 64  # PIL cuts off between its passes what goes beyond 0 and 255
    assert float((frames.resized(grey, size) - by_pil(grey)).abs().max()) <= 1
    assert torch.equal(found, found.round()) and 0 <= float(found.min()) <= float(found.max()) <= 255


def test_patches_are_those_of_transformers() -> None:
    """Of its image processor, for which an image is two equal frames; and each pair of frames is cut like that."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video(2, 84, 56)]
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    first, second = (processor(image, return_tensors="pt") for image in images)
    still, grid = frames.patches(video(2, 84, 56)[:1].float())
    assert [list(grid)] == first["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert distance(still, first["pixel_values"]) < 1e-6
    pair, grid = frames.patches(video(2, 84, 56).float())
    shape = (-1, 3, 2, 14, 14)
    assert grid == (1, 6, 4)
    assert distance(pair.view(shape)[:, :, 0], first["pixel_values"].view(shape)[:, :, 0]) < 1e-6
    assert distance(pair.view(shape)[:, :, 1], second["pixel_values"].view(shape)[:, :, 1]) < 1e-6


def test_an_odd_frame_counts_twice() -> None:
    odd = seen(5)
    found, grid = frames.patches(odd)
    wanted, same = frames.patches(torch.cat([odd, odd[-1:]]))
    assert torch.equal(found, wanted) and grid == same and len(found) == math.prod(grid)
    assert frames.token_count(*odd.shape) == len(found) // 4


def test_the_two_ways_to_show_a_clip() -> None:
    """As a file: 2 frames per second, bytes, its own shape. As released: every frame, -255 to 255, one shape for all."""
    clip = video(81, 48, 104)
    found = frames.as_file(clip, video_fps=16, fps=2)
    assert found.shape == (10, 3, *frames.fitted_size(48, 104))
    assert torch.equal(found, frames.resized(clip[frames.sampled_frames(81, 16, 2)], frames.fitted_size(48, 104)))
    pixel_TCHW = clip[:9] / 127.5 - 1
    released = frames.as_released(pixel_TCHW)
    assert released.shape == (9, 3, 336, 588)
    assert distance(released, frames.resized(2 * clip[:9].float() - 255, (336, 588))) < 1e-6
    assert float(released.min()) < -200 and float(released.max()) > 200


# The files


def test_a_missing_file_comes_with_the_command_that_brings_it(tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_runs.write_bench(tmp_path, "student", "short", ["a red disc"])
    sentence = r"VideoReward/model_config\.json is missing; `rfbench fetch videoreward` brings it"
    with pytest.raises(UserError, match=sentence) as caught:
        evaluate.evaluate(run, ["videoreward"])
    assert caught.value.code == 2
    with pytest.raises(UserError, match=sentence):
        origin_of(RewardCfg("videoreward_mq", beta=0.5)).open(16)
    checks = {check.name: check for check in doctor._scorers()}
    assert checks["scorer videoreward"].state == "missing" and "rfbench fetch" in checks["scorer videoreward"].found
    assert checks["scorer motion"].state == "ok"
    mirror = tmp_path / "mirror" / model.REPOSITORY
    mirror.parent.mkdir(parents=True)
    mirror.symlink_to(published)
    monkeypatch.setattr("sys.argv", ["rfbench", "fetch", "videoreward", "--mirror", str(tmp_path / "mirror"), "--yes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert [path.read_bytes() for path in model.files().values()] == [(published / file).read_bytes() for file in model.FILES]


def test_the_settings_are_read(published: Path) -> None:
    found = model.read_about(published / ABOUT)
    assert found == model.About(2.0, 200704, 3, 6, (0.5, 1.0, 0.25), (2.0, 0.25, 0.5))


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("data_config", "prompt_template_type", "simple", "'prompt_template_type' is 'simple', but only a VideoReward with 'detailed_special'"),
        ("peft_lora_config", "use_rslora", True, "'use_rslora' is True"),
        ("model_config", "reward_token", None, "'reward_token' is None"),
        ("inference_config", "MQ_std", 0.0, "'MQ_std' of 'inference_config' is 0.0"),
        ("inference_config", "TA_mean", "2", "'TA_mean' of 'inference_config' is '2'"),
        ("inference_config", None, None, "it has no 'inference_config'"),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path: Path, section: str, key: str | None, value: object, sentence: str) -> None:
    changed = copy.deepcopy(SETTINGS)
    if key is None:
        del changed[section]
    else:
        changed[section][key] = value
    (tmp_path / ABOUT).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=re.escape(sentence)):
        model.read_about(tmp_path / ABOUT)


def test_a_tokenizer_with_other_tokens_is_refused(published: Path, tmp_path: Path) -> None:
    other = replace(TINY, tokens=replace(TOKEN_IDS, scores=(1, 2, 4)))
    with pytest.raises(UserError, match=re.escape("'<|VQ_reward|>' is 7 there, not 1")):
        model.tokenizer_of(published / TOKENIZER, other)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        model.tokenizer_of(tmp_path / "tokenizer.json", TINY)


# The scorer


def filmed(run: Path, name: str, prompt: str, count: int) -> Clip:
    scene = world.draw_scene(world.parse(prompt), np.random.default_rng(int(name[:4])))
    return save(pixels(world.render(scene, count)), run, prompt, name=name)


def test_the_scorer_says_what_the_model_says_of_the_decoded_file(installed: Path, tmp_path: Path) -> None:
    scorer = pick(SCORERS, "videoreward", what="scorer")
    clips = [filmed(tmp_path, "0000-0", "a red disc", 33), filmed(tmp_path, "0001-0", "a blue square", 21)]
    rows = answered(scorer, clips, tmp_path)
    assert len(rows) == 14 and {row.metric for row in rows} == set(scorer.metrics) == {*AXES, "overall", *(f"{axis}_raw" for axis in AXES)}
    judge = model.load()
    assert judge.network.rm_head.weight.dtype == torch.bfloat16
    for clip in clips:
        shown = frames.as_file(torch.from_numpy(read_video(tmp_path, clip)).permute(0, 3, 1, 2), video_fps=16, fps=2)
        wanted = judge.score([shown], [clip.prompt])[0].tolist()
        values = {row.metric: row.value for row in rows if row.clip == clip.id}
        assert [values[axis] for axis in AXES] == pytest.approx(wanted, abs=0.05)  # bfloat16, another batch
        assert values["overall"] == pytest.approx(sum(values[axis] for axis in AXES))
        assert [values[f"{axis}_raw"] for axis in AXES] == pytest.approx(judge.raw([shown], [clip.prompt])[0].tolist(), abs=0.05)


def test_the_scorers_version_is_that_of_its_weights(installed: Path, tmp_path: Path) -> None:
    scorer = pick(SCORERS, "videoreward", what="scorer")
    assert scorer.version == f"2-{records.sha256_of(installed / WEIGHTS)[:12]}"
    assert all(isinstance(metric, Metric) and metric.higher_is_better for metric in scorer.metrics.values())
    run = fake_runs.write_bench(tmp_path, "student", "short", ["a red disc", "a blue square"], samples=1)
    evaluate.evaluate(run, ["videoreward"])
    note = json.loads((run / "scores" / "videoreward.json").read_text())
    assert note["version"] == scorer.version and len(records.read_rows(run / "scores" / "videoreward.jsonl", Score)) == 14


def test_a_clip_that_cannot_be_shown_is_refused_by_name(installed: Path, tmp_path: Path) -> None:
    scorer = pick(SCORERS, "videoreward", what="scorer")
    good, short = filmed(tmp_path, "0002-0", "a red disc", 9), filmed(tmp_path, "0003-0", "a red disc", 1)
    spoken = replace(good, id="0004-0", prompt=f"a red disc {ASKED[0]}")
    alone = answered(scorer, [good], tmp_path)
    answers = {answer.clip: answer for answer in scorer.score([short, good, spoken], tmp_path)}
    assert list(answers["0002-0"].rows) == alone
    assert str(answers["0003-0"].refused).startswith("clip 0003-0: VideoReward needs clips of at least 2 frames and this one has 1")
    assert "clip 0004-0: the prompt 'a red disc <|VQ_reward|>' contains a special token" in str(answers["0004-0"].refused)
    assert not answers["0003-0"].rows and not answers["0004-0"].rows


@pytest.mark.parametrize(("name", "kinds"), [("videoreward", hostile.NAMES), ("videoreward-as-released", ("truncated", "one frame", "1x1"))])
def test_broken_and_odd_clips_are_scored_or_refused_by_name(installed: Path, tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    (tmp_path / "videos").mkdir()
    named = {kind: hostile.write(tmp_path, kind, number) for number, kind in enumerate(kinds)}
    answers = {answer.clip: answer for answer in pick(SCORERS, name, what="scorer").score(list(named.values()), tmp_path)}
    for kind, clip in named.items():
        if kind in (*hostile.UNREADABLE, "one frame"):
            assert not answers[clip.id].rows and str(answers[clip.id].refused).startswith(f"clip {clip.id}: ")
        else:
            assert len(answers[clip.id].rows) == 7 and all(math.isfinite(row.value) for row in answers[clip.id].rows)


def test_the_released_scorer_shows_all_frames_at_one_size_in_the_wrong_range(installed: Path, tmp_path: Path) -> None:
    scorer = pick(SCORERS, "videoreward-as-released", what="scorer")
    clip = filmed(tmp_path, "0000-0", "a red disc", 5)
    pixels_TCHW = torch.from_numpy(read_video(tmp_path, clip)).permute(0, 3, 1, 2)
    shown = frames.resized(255 * (pixels_TCHW / 255 * 2 - 1), (336, 588))
    wanted = model.load().score([shown], ["a red disc"])[0].tolist()
    assert [row.value for row in answered(scorer, [clip], tmp_path)[:3]] == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.tuples(st.integers(2, 400), st.sampled_from([28, 336]), st.sampled_from([28, 588])), max_size=30))
def test_batches_keep_clips_in_order_and_within_the_room_there_is(sizes: list[tuple[int, int, int]]) -> None:
    clip = Clip("0000-0", 0, 0, "", "", 0, 2, 16, 2, 2, "", "")
    given = [(replace(clip, id=f"{number:04}-0"), torch.empty(1, 3, 1, 1).expand(count, 3, h, w)) for number, (count, h, w) in enumerate(sizes)]
    found = list(batches(given))
    assert [clip.id for batch in found for clip, _ in batch] == [clip.id for clip, _ in given]
    for batch in found:
        tokens = [frames.token_count(*shown.shape) for _, shown in batch]
        assert len(batch) == 1 or len(batch) * max(tokens) <= TOKENS


# The reward


def test_the_reward_is_what_the_scorer_would_say_of_a_lossless_file(installed: Path) -> None:
    clips = torch.stack([video(21, seed=1), video(21, seed=2)])
    reward = origin_of(RewardCfg("videoreward_mq", beta=0.5)).open(16)
    prompts = ["a red fox", "blue"]
    found = reward(clips.float() / 127.5 - 1, prompts)
    judge = model.load()
    assert torch.equal(found, judge.score([frames.as_file(clip, video_fps=16, fps=2) for clip in clips], prompts)[:, 1])
    faster = origin_of(RewardCfg("videoreward_mq", beta=0.5, fps=8.0)).open(16)
    assert not torch.equal(faster(clips.float() / 127.5 - 1, prompts), found)


def test_the_released_reward_is_the_first_clips_of_all_frames_in_the_wrong_range(installed: Path) -> None:
    clips = 2 * torch.rand(2, 3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) - 1
    found = origin_of(RewardCfg("videoreward_mq", beta=0.5, input="as_released")).open(16)(clips, ["a red fox", "blue"])
    wanted = model.load().score([frames.resized(255 * clips[0], (336, 588))], ["a red fox"])[0, 1]
    assert found.tolist() == [wanted, wanted]


def test_a_reward_that_has_no_input_setting_refuses_it() -> None:
    assert "videoreward_mq" in REWARDS
    assert origin_of(RewardCfg("toy_motion", beta=0.5)).open(16) is toy_motion
    with pytest.raises(UserError, match="'toy_motion' does not use 'input' and 'fps'"):
        RewardCfg("toy_motion", beta=0.5, fps=2.0)
    with pytest.raises(UserError, match="it is every frame"):
        RewardCfg("videoreward_mq", beta=0.5, input="as_released", fps=2.0)
