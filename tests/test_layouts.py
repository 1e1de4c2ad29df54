"""Tensors that other programs named: what training wrappers, diffusers and PEFT write comes back under the checkpoint's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rfbench import layouts
from rfbench.backbones.wan.dit import WanDiT
from rfbench.config import LoraCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.records import sha256_of
from rfbench.weight_files import identity, resolve
from rfbench.weights import load_into, merge, read_tensors
from tests.test_dit import KEYS
from tests.tiny import CFG, Tiny, distance, normal

PUBLISHED = {path.stem: dict(json.loads(path.read_text(encoding="utf-8"))["tensors"]) for path in KEYS.glob("wan_dit_*.json")}


WRAPPED = [  # as trainers of the Self-Forcing family leave them, and torch.compile
    ({"generator": "model."}, {}),
    ({"generator_ema": "model._fsdp_wrapped_module."}, {}),
    ({"generator_ema": "model._fsdp_wrapped_module.", "generator": "model.", "critic": "model."}, {}),
    ({"model": "_orig_mod."}, {"strip": ""}),
    ({"": "model."}, {"key": None}),
    ({"": "_orig_mod.model._fsdp_wrapped_module._checkpoint_wrapped_module."}, {"key": None}),
]


@pytest.mark.parametrize(("entries", "fields"), WRAPPED, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_wrappers_of_training_are_taken_off(tmp_path: Path, entries: dict[str, str], fields: dict[str, Any]) -> None:
    path = tmp_path / "model.pt"
    wanted = Tiny().denoiser.state_dict()
    inside = {
        entry: {prefix + name.replace(".", "._fsdp_wrapped_module.", 1): tensor for name, tensor in wanted.items()}
        for entry, prefix in entries.items()
    }
    torch.save(inside.get("", inside), path)
    found = read_tensors(path, WeightsCfg(path.name, **{"key": next(iter(entries)), "strip": "model."} | fields))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@given(name=st.sampled_from(sorted(PUBLISHED["wan_dit_1.3B"])), data=st.data())
def test_wrappers_may_stand_anywhere_in_a_name(name: str, data: st.DataObject) -> None:
    parts = name.split(".")
    for place in range(len(parts)):
        parts[place] = "".join(data.draw(st.lists(st.sampled_from(layouts.WRAPPERS), max_size=2))) + parts[place]
    assert layouts.unwrapped(".".join(parts)) == name


@pytest.mark.parametrize("published", PUBLISHED)
def test_names_of_diffusers_and_original_ones_are_one_to_one(published: str) -> None:
    own = set(PUBLISHED[published]) | {"fps_embedding.weight", "fps_projection.0.bias", "fps_projection.2.weight"}
    theirs = {layouts.to_diffusers(name) for name in own}
    assert len(theirs) == len(own) and {layouts.from_diffusers(name) for name in theirs} == own
    assert layouts.is_diffusers(theirs) and not layouts.is_diffusers(own)


def of_diffusers() -> Any:
    """diffusers' model of the same size as the tests' own, with random weights."""
    from diffusers import WanTransformer3DModel

    peer: Any = WanTransformer3DModel(
        patch_size=CFG.patch,
        num_attention_heads=CFG.num_heads,
        attention_head_dim=CFG.head_dim,
        in_channels=CFG.in_dim,
        out_channels=CFG.out_dim,
        text_dim=CFG.text_dim,
        freq_dim=CFG.freq_dim,
        ffn_dim=CFG.ffn_dim,
        num_layers=CFG.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=CFG.eps,
    )
    with torch.no_grad():
        for number, parameter in enumerate(peer.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    return peer


@torch.no_grad()
def test_a_folder_of_diffusers_gives_the_model_that_diffusers_runs(tmp_path: Path) -> None:
    peer = of_diffusers()
    peer.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    with torch.device("meta"):
        own = WanDiT(CFG)
    load_into(own, read_tensors(tmp_path, WeightsCfg(tmp_path.name)), where=tmp_path)
    same_output(own, peer)


@torch.no_grad()
def test_our_weights_under_their_names_make_diffusers_run_our_model() -> None:
    own, peer = Tiny(seed=3).denoiser, of_diffusers()
    peer.load_state_dict({layouts.to_diffusers(name): tensor for name, tensor in own.state_dict().items()}, strict=True)
    same_output(own, peer)


def same_output(own: WanDiT, peer: Any) -> None:
    x_BFCHW, text_BLE = normal(2, 3, 3, 4, 6), normal(2, CFG.text_len, CFG.text_dim, seed=1)
    t = torch.tensor([700.0, 20.0])
    theirs = peer.eval()(x_BFCHW.transpose(1, 2), t, text_BLE, return_dict=False)[0].transpose(1, 2)
    error = distance(own(x_BFCHW, t[:, None], text_BLE), theirs)
    print(f"relative error against diffusers: {error:.1e}")
    assert error < 1e-5


def adapted(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor], LoraCfg]:
    """A PEFT model with random adapters on all linear layers of all blocks, its adapter's tensors, and their settings."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    cfg = LoraCfg("lora.pt", rank=3, alpha=6.0, key="generator_lora")
    base = Tiny().denoiser.to(dtype)
    parts = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name.startswith("blocks.")]
    peft: Any = get_peft_model(base, LoraConfig(r=cfg.rank, lora_alpha=int(cfg.alpha), target_modules=parts))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(peft.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    return peft, get_peft_model_state_dict(peft), cfg


@pytest.mark.parametrize("default", ["", ".default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, default: str, dtype: torch.dtype) -> None:
    peft, adapter, lora = adapted(tmp_path, dtype)
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in Tiny().denoiser.to(dtype).state_dict().items()}}, tmp_path / "base.pt")
    named = {name.replace(".weight", f"{default}.weight"): tensor for name, tensor in adapter.items()}
    torch.save({"generator_lora": named, "critic_lora": {}}, tmp_path / "lora.pt")
    cfg = WeightsCfg("base.pt", key="generator", strip="model.", lora=lora)
    with torch.device("meta"):
        found = WanDiT(CFG).to(dtype)
    load_into(found, read_tensors(tmp_path / "base.pt", cfg), where=tmp_path)
    wanted = peft.float().merge_and_unload().state_dict()  # in float32, whatever the weights were kept in
    changed = 0
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.float(), wanted[name].to(dtype).float(), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)
        changed += not torch.equal(tensor, Tiny().denoiser.state_dict()[name].to(dtype))
    assert changed == 10 * CFG.num_layers


def test_every_adapter_of_a_published_checkpoint_finds_its_weight() -> None:
    shapes = dict(json.loads((KEYS / "wan_dit_1.3B.json").read_text(encoding="utf-8"))["tensors"])
    base = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    linear = [name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]
    adapter: dict[str, Tensor] = {}
    for name in linear:
        rows, columns = shapes[name]
        part = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{part}.lora_A.weight": torch.empty(256, columns, device="meta"), f"{part}.lora_B.weight": torch.empty(rows, 256, device="meta")}
    assert len(adapter) == 600
    merged = merge(base, adapter, LoraCfg("lora.pt", 256, 256.0), where=Path("lora.pt"))
    assert len(merged.adapters) == 300 and {name: list(tensor.shape) for name, tensor in merged.items()} == shapes


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, adapter, cfg = adapted(tmp_path)
    base = Tiny().denoiser.state_dict()
    some = next(name for name in adapter if name.endswith("lora_A.weight"))
    part = some.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

    def refused_with(changes: dict[str, Any], **fields: Any) -> str:
        found = {name: tensor for name, tensor in (adapter | changes).items() if tensor is not None}
        with pytest.raises(UserError) as raised:
            merge(base, found, LoraCfg("lora.pt", **{"rank": cfg.rank, "alpha": 1.0} | fields), where=tmp_path / "lora.pt")
        assert str(tmp_path / "lora.pt") in str(raised.value) and "\n" not in str(raised.value)
        return str(raised.value)

    assert f"the adapter of '{part}.weight' lacks its half A" in refused_with({some: None})
    assert "lacks its half B" in refused_with({some.replace("lora_A", "lora_B"): None})
    assert "the checkpoint has no 'blocks.9.ffn.0.weight'" in refused_with({f"blocks.9.ffn.0.lora_{side}.weight": torch.zeros(3, 3) for side in "AB"})
    assert "which is not rank 4" in refused_with({}, rank=4)
    assert "which is not rank 3 for a weight" in refused_with({some: torch.zeros(3, 5)})
    assert "is not a LoRA matrix" in refused_with({"base_model.model.blocks.0.ffn.0.lora_magnitude_vector": torch.zeros(3)})
    assert "is not a LoRA matrix" in refused_with({some: 3})
    assert "holds no adapter" in refused_with(dict.fromkeys(adapter))


def test_an_adapter_is_found_beside_its_checkpoint_and_counts_in_its_identity(folders: Path, tmp_path: Path) -> None:
    _, adapter, _ = adapted(tmp_path)
    lora = LoraCfg("models/lora.pt", rank=3, alpha=6.0)
    cfg, yaml = WeightsCfg("models/base/base.pt", repo="a/b", lora=lora), tmp_path / "x.yaml"
    base = folders / "weights" / "a" / "b" / "models" / "base" / "base.pt"
    base.parent.mkdir(parents=True)
    torch.save(Tiny().denoiser.state_dict(), base)
    with pytest.raises(UserError, match=r"adapter 'models/lora.pt', named by x.yaml, is not at .*weights/a/b/models/lora.pt"):
        resolve(cfg, yaml)
    torch.save(adapter, folders / "weights" / "a" / "b" / "models" / "lora.pt")
    path = resolve(cfg, yaml)
    first = identity(path, cfg)
    assert first not in (sha256_of(base), identity(path, WeightsCfg(cfg.file)))
    torch.save({name: tensor * 2 for name, tensor in adapter.items()}, folders / "weights" / "a" / "b" / "models" / "lora.pt")
    assert identity(path, cfg) != first
    absolute = WeightsCfg(str(base), lora=LoraCfg("../lora.pt", rank=3, alpha=6.0))
    assert resolve(absolute, yaml) == base and identity(base, absolute) == identity(path, cfg)
    with pytest.raises(UserError, match=r"lora\.pt has sha256 .* but x\.yaml asks for 000000000000"):
        resolve(WeightsCfg(cfg.file, repo="a/b", lora=LoraCfg(lora.file, 3, 6.0, sha256="0" * 64)), yaml)
