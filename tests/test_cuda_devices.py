"""The whole way of a stream on a GPU, without one: tensors that have a device, sizes and a dtype, and no contents (torch's FakeTensorMode).

An operation that mixes tensors of host and device fails, and so does whatever reads a value of the device. Replaced is what asks a GPU itself,
and nothing else: copies from the host by page-locked memory, the launch of a kernel, which kernel of attention there is, and in a torch for CPUs
the guard that switches between GPUs. Schedules are computed on the host, whose values have to be real, so they are made beforehand.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfbench import attention, cache, config, forcing, hardware, memory, proof, rolling, sampler, video
from rfbench.backbones.wan import backbone as family
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.config import CacheCfg, Recipe, SamplerCfg
from rfbench.methods.base import Batch
from rfbench.sampler import clip_noise, stream

CUDA = torch.device("cuda", 0)


class Strict(TorchDispatchMode):
    """Within a chunk, refuses what is of host and device at once, copies among it; and with `narrow` float64 on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.narrow, self.seen = False, False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before, after = ([x for x in tree_leaves(what) if isinstance(x, Tensor)] for what in ((args, kwargs), out))
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_")
        devices = {x.device.type for x in (*before, *after) if x.is_cuda or x.ndim or copies}  # a number of the host goes along with a launch
        assert not (self.inside and devices == {"cpu", "cuda"}), f"{func} copies between host and device"
        self.seen += devices == {"cuda"}
        wide = [x.dtype for x in after if x.is_cuda and x.dtype in (torch.float64, torch.complex128)]
        assert not (self.narrow and wide), f"{func} computes in {wide[0]}"
        return out


@pytest.fixture(scope="module", autouse=True)
def guard() -> Iterator[None]:
    """A torch without CUDA has nobody who switches between GPUs, and many operations ask for one: of device `meta` has nothing to switch."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # by c10::DeviceType
    guards[1] = guards[14]
    yield
    guards[1] = None


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Strict]:
    """A GPU of shapes. What was remembered of other devices, or is remembered of this one, is forgotten."""
    remembered = (attention.rotations, cache._rows)

    def to_device(x: Tensor, device: torch.device) -> Tensor:
        assert x.device.type == "cpu"
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for place in (attention, cache, sampler, rolling, forcing):
        monkeypatch.setattr(place, "to_device", to_device)
    monkeypatch.setattr(attention, "kernel", lambda device: "torch-sdpa")
    for table in remembered:
        table.cache_clear()
    with FakeTensorMode(), Strict() as mode:
        yield mode
    for table in remembered:
        table.cache_clear()


def onto(backbone: nn.Module) -> Any:
    """The weights, which have no contents yet, on the GPU."""
    for part in backbone.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=CUDA), requires_grad=False)
    return backbone


def shallow(member: family.Member, **options: Any) -> family.WanBackbone:
    """Of the published sizes, but with two blocks."""
    member = dataclasses.replace(member, dit=dataclasses.replace(member.dit, num_layers=2))
    how: dict[str, Any] = {"precision": "bfloat16", "decoder": "vae", "reduced": False} | options
    return family.WanBackbone(member, **how)


def text(backbone: family.WanBackbone) -> Tensor:
    cfg = backbone.denoiser.cfg
    return torch.empty(1, cfg.text_len, cfg.text_dim, dtype=backbone.dtype, device=CUDA)


def computed_before(cfg: SamplerCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, levels = sampler.timesteps(cfg), sampler.noise_levels(cfg)
    monkeypatch.setattr(sampler, "timesteps", lambda cfg: steps)
    monkeypatch.setattr(sampler, "noise_levels", lambda cfg: levels)


RULES: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 6},
    "static_sink": {"window": 9, "sink": 3},
    "ema_sink": {"window": 9, "sink": 3, "alpha": 0.999, "fold_dtype": "bfloat16"},
}
WAYS = [(policy, rope) for policy in RULES for rope in ("relative", "absolute") if (policy, rope) != ("ema_sink", "absolute")]  # which is refused


@pytest.mark.parametrize(("joint", "kernels"), [(True, True), (False, False)], ids=["joint-kernels", "alone-torch"])
@pytest.mark.parametrize(
    ("policy", "rope"), [(policy, rope) for policy in RULES for rope in ("relative", "absolute")][:-1]
)  # no sink averages rotated keys
def test_a_stream_stays_on_its_gpu(policy: str, rope: Any, joint: bool, kernels: bool, launched: list[str], request: Any, monkeypatch: Any) -> None:
    """At the published sizes, over enough chunks for every policy to evict; in bfloat16, with 8-bit products or in Wan's mixed precision."""
    precision = {"full": "mixed", "static_sink": "float8"}.get(policy, "bfloat16")
    cfg = SamplerCfg((1000, 500), 5.0, cache=CacheCfg(policy, rope=rope, **RULES[policy]))
    computed_before(cfg, monkeypatch)
    backbone = shallow(family.WAN_1_3B, precision=precision)
    strict: Strict = request.getfixturevalue("strict")
    lean = LeanDiT(onto(backbone).denoiser, Shortcuts(joint=joint, kernels=None if kernels else False, graphs=False))
    assert ("kernels" in lean.taken, "joint" in lean.taken) == (kernels, joint)

    def mark(event: str) -> None:
        strict.inside, strict.narrow = event == "begin", event == "begin" and made > 1  # tables of timesteps are made once, in float64

    made = 0
    for chunk in stream(backbone, text(backbone), 12, cfg, clip_noise(backbone, [0]), mark=mark, lean=lean):
        assert chunk.latent_BFCHW.device == CUDA and chunk.latent_BFCHW.shape == (1, 3, 16, 60, 104)
        made += 1
    assert made == 4 and strict.seen > 500 and bool(launched) == kernels


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel can prove itself without numbers, which must not count for other tests."""
    monkeypatch.setattr(proof, "left_out", {})
    monkeypatch.setattr(proof, "_verdicts", {})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are taken as if they had proved themselves; what is launched is noted, and all that it is given has to be on the GPU."""
    found = list[str]()
    kernels: Any = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*given: Any, **sizes: Any) -> None:
                found.append(self.name)
                assert all(x.is_cuda for x in given if isinstance(x, Tensor)), f"{self.name} is given what lies on the host"

            return launch

    for name, value in vars(kernels).items():
        if name.startswith("_") and type(value).__name__ in ("JITFunction", "InterpretedFunction"):
            monkeypatch.setattr(kernels, name, Launch(name))
    monkeypatch.setattr(proof, "tried", lambda name, trial: None)
    return found


@pytest.mark.parametrize("solver", ["rolling", "forcing"])
def test_windows_of_several_chunks_stay_there_too(solver: Any, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfgs = {
        "rolling": SamplerCfg((1000, 750, 500), 5.0, solver="rolling", cache=CacheCfg("static_sink", window=12, sink=3, rope="absolute")),
        "forcing": SamplerCfg(4, 5.0, solver="forcing", chunk=3, lag=2, first_state="overwritten"),
    }
    computed_before(cfgs[solver], monkeypatch)
    backbone = shallow(family.WAN_1_3B)
    strict: Strict = request.getfixturevalue("strict")
    onto(backbone)

    def mark(event: str) -> None:
        strict.inside = event == "begin"

    made = list(stream(backbone, text(backbone), 15, cfgs[solver], clip_noise(backbone, [0]), mark=mark))
    assert len(made) == 5 and all(chunk.latent_BFCHW.device == CUDA for chunk in made)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("which", ["2.1", "2.2", "tiny"])
def test_pixels_are_made_there_and_leave_as_bytes(which: str, kernels: bool, launched: list[str], request: Any, monkeypatch: Any) -> None:
    member = family.WAN_5B if which == "2.2" else family.WAN_1_3B
    backbone = shallow(member, decoder="tiny" if which == "tiny" else "vae")
    strict: Strict = request.getfixturevalue("strict")
    size = (1, 3, member.dit.in_dim, backbone.shape.height, backbone.shape.width)
    with hardware.by(Shortcuts(kernels=None if kernels else False)):
        decode = onto(backbone).decoder()
        convs = [part for part in (backbone.tiny or backbone.vae).modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
        lying = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
        assert all(conv.weight.is_contiguous(memory_format=lying[type(conv)]) for conv in convs), "as frames do, or cuDNN copies them in every call"
        strict.inside = strict.narrow = True
        shown = [video.as_uint8(decode(torch.empty(size, dtype=torch.bfloat16, device=CUDA))) for _ in range(3)]
    assert [frames.shape[1] for frames in shown] == [9, 12, 12] and bool(launched) == kernels
    assert all((frames.device, frames.dtype) == (CUDA, torch.uint8) and frames.shape[2:] == (member.height, member.width, 3) for frames in shown)


def test_what_does_not_stay_there_is_seen(strict: Strict) -> None:
    here, there = torch.empty(3), torch.empty(3, device=CUDA)
    strict.inside = True
    for wrong in (lambda: here + there, there.tolist, lambda: there.copy_(here), there.cpu):
        with pytest.raises((RuntimeError, AssertionError)):
            wrong()
    there.double()
    strict.narrow = True
    with pytest.raises(AssertionError, match=r"computes in torch\.float64"):
        there.double()


@pytest.mark.parametrize("name", ["wan/reward-forcing", "wan/self-forcing"])
def test_a_step_of_training_stays_there_as_far_as_its_losses(name: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout, decoding for a reward, scores and critic, with one block each. What is drawn comes from the host; backwards torch asks the driver."""
    recipe = config.load(Recipe, name)
    assert recipe.scores is not None
    method: Any = memory._method(dataclasses.replace(recipe, latents=6, scores=dataclasses.replace(recipe.scores, latents=3)), 1)
    computed_before(method.rollout, monkeypatch)
    strict: Strict = request.getfixturevalue("strict")
    monkeypatch.setattr(memory, "META", CUDA)
    monkeypatch.setattr(torch, "randint", lambda high, size, generator: torch.tensor([high - 1]))
    method.reward = lambda pixel_BTCHW, prompts: pixel_BTCHW.mean((1, 2, 3, 4))
    for part in (method.student, method.teacher, method.critic):
        onto(part)
    for part in method.modules.values():
        part.requires_grad_(True)
    with memory.flash():
        losses, stats = method.losses(Batch((0,), 0), tuple(method.modules))
    assert set(losses) == {"generator", "critic"} and strict.seen > 500
    assert all(x.device == CUDA for x in (*losses.values(), *stats.values())) and all(loss.requires_grad for loss in losses.values())
