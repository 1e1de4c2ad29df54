"""The shipped baselines against what is known of the systems: settings, sizes and identities."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from rfbench import baselines, config, strict
from rfbench.backbones.base import BACKBONES, accepts, open_backbone, parts_of, pixel_frames
from rfbench.backbones.known import KNOWN
from rfbench.config import Baseline, CacheCfg, LoraCfg, Streamed, WeightsCfg
from rfbench.errors import UserError
from rfbench.registry import pick
from rfbench.sampler import timesteps

WAN = {name: config.load(Baseline, name) for name in config.names_of(Baseline) if name.startswith("wan/")}
WARPED = (1000, 937.5, 833.333, 625)  # 1000, 750, 500, 250 looked up in the table of shift 5

# Window (sink and chunk counted in), sink, RoPE, timesteps and shift of each system, and the GiB of its K and V in bfloat16 over 30 layers
# of 1560 x 1536 per frame: read off the authors' configurations and code. None: the whole clip at once, without a cache.
SYSTEMS: dict[str, tuple[int | None, int | None, str | None, tuple[float, ...] | int, float, float | None]] = {
    "reward-forcing": (9, 3, "relative", WARPED, 5.0, 2.41),
    "reward-forcing-fp32": (9, 3, "relative", WARPED, 5.0, 2.41),
    "self-forcing": (21, None, "absolute", WARPED, 5.0, 5.62),
    "self-forcing-sid": (21, None, "absolute", WARPED, 5.0, 5.62),
    "self-forcing-gan": (21, None, "absolute", WARPED, 5.0, 5.62),
    "causvid": (21, None, "absolute", (1000, 757, 522), 8.0, 5.62),
    "causvid-warp4": (21, None, "absolute", (1000, 960, 888.889, 727.273), 8.0, 5.62),
    "longlive-1.0": (12, 3, "absolute", WARPED, 5.0, 3.21),
    "longlive-1.0-infinity": (12, 3, "relative", WARPED, 5.0, 3.21),
    "infinite-forcing": (6, 1, "relative", WARPED, 5.0, 1.61),
    "rolling-forcing": (21, 3, "absolute", (1000, 952.381, 882.353, 769.231, 555.556), 5.0, 6.43),
    "wan2.1-1.3b": (None, None, None, 50, 8.0, None),
    "wan2.1-14b": (None, None, None, 50, 5.0, None),
}


def test_every_system_is_there() -> None:
    assert {name.removeprefix("wan/") for name in WAN} >= SYSTEMS.keys()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_sampler_is_the_systems_own(name: str) -> None:
    window, sink, rope, steps, shift, gib = SYSTEMS[name]
    found = WAN[f"wan/{name}"]
    cfg, cache = found.sampler, found.sampler.cache
    assert (cfg.shift, cfg.context_noise) == (shift, 0.0)
    assert found.precision == ("mixed" if name.startswith("wan2.1") else None)  # Wan's own code has float32 islands, its students have none
    if isinstance(steps, int):
        assert (cfg.steps, cfg.chunk, cache, cfg.solver, found.max_latents) == (steps, None, None, "unipc", 21)
        assert cfg.guidance == {"wan2.1-1.3b": 6.0, "wan2.1-14b": 5.0}[name] and len(cfg.negative) == 137
        return
    assert cache is not None and cache.window is not None
    rolling = name == "rolling-forcing"
    assert (cfg.chunk, cfg.guidance, cfg.solver) == (3, 1.0, "rolling" if rolling else "renoise")
    assert (cache.window, cache.sink, cache.rope) == (window, sink, rope)
    assert timesteps(cfg) == pytest.approx(steps, abs=1e-3)
    frames = cache.window + (cache.sink or 0 if rolling else 0)  # Rolling Forcing keeps its sink a second time, without rotation
    assert round(frames * 1560 * 1536 * 30 * 2 * 2 / 2**30, 2) == gib
    assert cache.policy == ("ema_sink" if "reward" in name else "static_sink" if sink else "window")
    assert found.max_latents == (1024 if rope == "absolute" and cfg.reroll is None else None)  # the authors' table of absolute positions ends there


def test_skyreels_is_run_as_its_readme_recommends() -> None:
    """--ar_step 0, --base_num_frames 97, --overlap_history 17, --addnoise_condition 20, and the network of Wan2.1 1.3B with five tensors more."""
    found = WAN["wan/skyreels-v2-df-1.3b"]
    cfg = found.sampler
    assert (cfg.steps, cfg.shift, cfg.guidance, cfg.solver, cfg.cache, cfg.causal) == (50, 8.0, 6.0, "forcing", None, False)
    assert cfg.negative == WAN["wan/wan2.1-1.3b"].sampler.negative and cfg.first_state == "overwritten"
    assert cfg.reroll is not None and found.max_latents is None
    assert (pixel_frames(cfg.reroll.latents), pixel_frames(cfg.reroll.overlap), cfg.reroll.anew) == (97, 17, "all")
    assert 1000 * cfg.context_noise == 20
    backbone = open_backbone(found.backbone, precision=found.precision)
    shape = backbone.shape
    assert (shape.pixel_height, shape.pixel_width, shape.fps, shape.height, shape.width) == (544, 960, 24, 68, 120)
    assert len(backbone.denoiser.state_dict()) == 830 and backbone.denoiser.cfg.fps == 24


def test_longlive_2_is_run_as_its_configuration_says() -> None:
    """configs/inference.yaml of NVlabs/LongLive@7860ad9: 4 steps of UniPC on each 8 latents, of which 32 are seen, the first 8 always."""
    found = WAN["wan/longlive-2.0-5b"]
    cfg = found.sampler
    assert (cfg.chunk, cfg.solver, cfg.shift, cfg.guidance, cfg.context_noise, found.precision) == (8, "unipc", 5.0, 1.0, 0.0, None)
    assert timesteps(cfg) == (999, 937, 833, 624)  # of Wan's own grid: cut to integers, and the first is not 1000
    assert cfg.cache == CacheCfg("static_sink", window=32, sink=8, rope="absolute", shot_offset=8)
    shape = open_backbone(found.backbone).shape
    assert (shape.channels, shape.height, shape.width, shape.fps) == (48, 44, 80, 24)
    assert baselines.prepare("longlive-2.0-5b", random_weights=True).latents(509, "a clip of 21 s") == 128 <= (found.max_latents or 0)


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_known_of_a_backbone_is_what_it_says_of_itself_once_built(name: str) -> None:
    known, code = KNOWN[name], pick(BACKBONES, name, what="backbone")
    assert set(known.settings) == set(inspect.signature(code).parameters)
    for decoder in (None, *(("vae", "tiny") if "decoder" in known.settings else ())):
        built = open_backbone(name, decoder=decoder)
        assert (known.fps, known.parts(decoder)) == (built.shape.fps, built.parts())
        assert parts_of(name, decoder=decoder) == built.parts()
    for precision in get_args(Streamed):
        if precision in known.precisions:
            assert open_backbone(name, precision=precision).parts() == parts_of(name, precision=precision)
        else:
            with pytest.raises(UserError, match=f"does not use 'precision' {precision}"):
                parts_of(name, precision=precision)


def test_a_backbone_of_which_nothing_is_known_is_built_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "mine", BACKBONES["wan2.2-5b"])
    assert parts_of("mine") == KNOWN["wan2.2-5b"].parts(None) and not accepts("mine", "decoder")
    with pytest.raises(UserError, match="backbone 'mine' does not use 'decoder'"):
        parts_of("mine", decoder="tiny")


def differences(left: Any, right: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        return {where: pair for key in left for where, pair in differences(left[key], right[key], f"{at}.{key}".strip(".")).items()}
    return {} if left == right else {at: (left, right)}


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("reward-forcing", "reward-forcing-fp32", {"sampler.cache.fold_dtype": ("bfloat16", "float32")}),
        ("longlive-1.0", "longlive-1.0-infinity", {"sampler.cache.rope": ("absolute", "relative"), "max_latents": (1024, None)}),
        ("skyreels-v2-df-1.3b", "skyreels-v2-df-1.3b-async", {"sampler.chunk": (None, 5), "sampler.lag": (None, 5)}),
        ("self-forcing", "self-forcing-gan", {"weights.file": ("checkpoints/self_forcing_dmd.pt", "checkpoints/self_forcing_gan.pt")}),
    ],
)
def test_variants_differ_in_what_makes_them_variants(one: str, other: str, wanted: dict[str, tuple[Any, Any]]) -> None:
    found = differences(strict.as_plain(WAN[f"wan/{one}"]), strict.as_plain(WAN[f"wan/{other}"]))
    told = {key: pair for key, pair in found.items() if key not in ("title", "weights.bytes", "weights.sha256")}
    assert told == wanted


@pytest.mark.parametrize("name", WAN)
def test_where_it_comes_from_is_said_in_full(name: str) -> None:
    found = WAN[name]
    assert found.weights.repo and found.license.code and found.license.weights
    assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", found.code or "")
    assert found.paper is None or re.fullmatch(r"arXiv:\d{4}\.\d{5}", found.paper)
    parts: list[WeightsCfg | LoraCfg] = [found.weights, *([found.weights.lora] if found.weights.lora else [])]
    for part in parts:
        assert part.sha256 is None or re.fullmatch("[0-9a-f]{64}", part.sha256)
        assert (part.sha256 is None) == (part.bytes is None)
    assert found.weights.revision is None or re.fullmatch("[0-9a-f]{40}", found.weights.revision)
    assert found.weights.revision is not None or found.weights.sha256 is None, "a hash belongs to a revision"
    assert "nc" not in found.license.weights.split("-") or "no commercial use" in found.license.note


def test_the_last_part_of_a_name_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.find(Baseline, "self-forcing") == config.find(Baseline, "wan/self-forcing")
    assert baselines.prepare("self-forcing", random_weights=True).name == "wan/self-forcing"
    with pytest.raises(UserError, match=r"there is no baseline 'self-forcin'; did you mean 'wan/self-forcing'\?"):
        config.find(Baseline, "self-forcin")
    for name in ("a/teacher", "b/teacher", "b/c/student", "student"):
        (tmp_path / "baselines" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "baselines" / f"{name}.yaml").write_text("")
    monkeypatch.setattr(config, "HOME", tmp_path)
    with pytest.raises(UserError, match=r"baseline 'teacher' can be a/teacher or b/teacher; write the whole name"):
        config.find(Baseline, "teacher")
    assert config.whole_name(Baseline, "student") == "student" and config.whole_name(Baseline, "c/student") == "b/c/student"
