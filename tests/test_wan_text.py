"""The text encoder against transformers, its tokens against transformers' tokenizer, and a cache that never changes an embedding."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from rfbench.backbones.wan import text
from rfbench.backbones.wan.text import UMT5_XXL, UMT5Cfg, WanText, clean, embed, empty_encoder, key_map, load_encoder
from rfbench.errors import UserError
from rfbench.weight_files import files_of, sha256_of

GOLDEN = Path(__file__).parent / "golden"
TINY = UMT5Cfg(vocab=64, dim=16, head_dim=4, ffn_dim=24, heads=2, layers=2, text_len=12)


@pytest.fixture(scope="module")
def network() -> Any:
    """transformers' own encoder with random weights that make every part matter."""
    from transformers import UMT5EncoderModel

    torch.manual_seed(0)
    network = UMT5EncoderModel(empty_encoder(TINY).config).eval()
    for name, tensor in network.state_dict().items():
        torch.nn.init.normal_(tensor, mean=float("norm" in name), std=0.3)
    return network


@pytest.fixture
def weights(network: Any, tmp_path: Path) -> Path:
    """The same weights as the original checkpoint has them: the key map backwards."""
    tensors = network.state_dict()
    torch.save({ours: tensors[theirs].clone() for ours, theirs in key_map(TINY.layers).items()}, tmp_path / "t5.pth")
    return tmp_path / "t5.pth"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory with a Unigram tokenizer made the way UMT5's is."""
    pieces = [("<pad>", 0.0), (text.EOS, 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("▁red", -3.0), ("▁disc", -3.0), ("moves", -4.0)]
    made = Tokenizer(models.Unigram([*pieces, *((letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz&é。")], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens([AddedToken(name, special=True) for name, _ in pieces[:3]])
    made.post_processor = processors.TemplateProcessing(single=f"$A {text.EOS}", special_tokens=[(text.EOS, 1)])
    made.enable_padding(length=3)  # whatever the file says of lengths is not heeded
    (tmp_path / "tokenizer").mkdir()
    made.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


def wan_text(
    weights: Path, tokenizer: Path, cache: Path | None = None, dtype: torch.dtype = torch.float32, cfg: UMT5Cfg = TINY, sha256: str | None = None
) -> WanText:
    return WanText(weights, tokenizer, cache, dtype=dtype, cfg=cfg, sha256=sha256)


def same(a: Any, b: Any) -> bool:
    ids = torch.arange(12).view(1, -1)
    return torch.equal(a(ids).last_hidden_state, b(ids).last_hidden_state)


def test_the_key_map_is_that_of_the_published_checkpoint() -> None:
    """All names and shapes of the full-size file, and every tensor of the full-size model."""
    published = dict(json.loads((GOLDEN / "keys" / "umt5_xxl_encoder.json").read_text())["tensors"])
    names, empty = key_map(UMT5_XXL.layers), {name: list(tensor.shape) for name, tensor in empty_encoder(UMT5_XXL).state_dict().items()}
    assert {ours: empty[theirs] for ours, theirs in names.items()} == published
    assert {*names.values(), text.TIED} == empty.keys()


def test_original_weights_make_the_same_network(network: Any, weights: Path) -> None:
    loaded = load_encoder(weights, TINY, torch.float32)
    assert same(loaded, network)
    assert all(not tensor.is_meta and not tensor.requires_grad for tensor in loaded.state_dict().values())
    assert loaded.shared is loaded.encoder.embed_tokens


@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_of_transformers_makes_the_same_network(network: Any, tmp_path: Path, shards: int) -> None:
    folder = tmp_path / "text_encoder"
    network.save_pretrained(folder, max_shard_size="1GB" if shards == 1 else "7KB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1)
    assert same(load_encoder(folder, TINY, torch.float32), network)
    before = sha256_of(files_of(folder))
    save_file(load_file(files[-1]), files[-1], {"format": "pt", "other": "bytes"})
    assert sha256_of(files_of(folder)) != before
    files[-1].unlink()
    with pytest.raises(UserError, match="lacks 1 of the 3 files" if shards > 1 else "has no"):
        load_encoder(folder, TINY, torch.float32)


@pytest.mark.parametrize("names", [(text.EMBEDDING,), (text.TIED,), (text.EMBEDDING, text.TIED)])
def test_the_embedding_may_have_either_name(network: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    path, tensors = tmp_path / "x.safetensors", {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kept = {name: tensor for name, tensor in tensors.items() if name in names or name not in (text.EMBEDDING, text.TIED)}
    save_file(kept, path)
    assert same(load_encoder(path, TINY, torch.float32), network)
    if len(names) == 2:
        kept[text.TIED][3, 3] += 1
        save_file(kept, path)
        with pytest.raises(UserError, match="two different embeddings"):
            load_encoder(path, TINY, torch.float32)


def test_loading_copies_no_tensor(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(weights)
    monkeypatch.setattr(text, "read_tensors", lambda path, cfg: content)
    loaded = load_encoder(weights, TINY, torch.float32).state_dict()
    assert all(loaded[theirs].data_ptr() == content[ours].data_ptr() for ours, theirs in key_map(TINY.layers).items())
    assert loaded[text.TIED].data_ptr() == content["token_embedding.weight"].data_ptr()
    assert {tensor.dtype for tensor in load_encoder(weights, TINY, torch.bfloat16).state_dict().values()} == {torch.bfloat16}


def test_other_checkpoints_are_refused(weights: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = torch.load(weights)

    def refused(**changes: Any) -> str:
        torch.save({name: value for name, value in (tensors | changes).items() if value is not None}, weights)
        with pytest.raises(UserError) as raised:
            load_encoder(weights, TINY, torch.float32)
        assert str(weights) in str(raised.value)
        return str(raised.value)

    broken = tensors["blocks.1.attn.o.weight"].clone()
    broken[-1, -1] = float("nan")
    assert "it lacks 1 tensor(s), first 'norm.weight'" in refused(**{"norm.weight": None})
    assert "it has unknown 1 tensor(s), first 'blocks.2.norm1.weight'" in refused(**{"blocks.2.norm1.weight": torch.zeros(16)})
    assert "it has another shape of 2 tensor(s), first 'encoder.embed_tokens.weight'" in refused(**{"token_embedding.weight": torch.zeros(63, 16)})
    attention = "encoder.block.1.layer.0.SelfAttention.o.weight"
    assert f"NaN or infinity in 1 tensor(s), first '{attention}'" in refused(**{"blocks.1.attn.o.weight": broken})
    for dtype in (torch.int64, torch.float8_e4m3fn):  # the fp8 file of a third party has other numbers
        assert "it has another kind of number in 1 tensor(s)" in refused(**{"norm.weight": torch.zeros(16).to(dtype)})
    assert "it has another kind of number in 2 tensor(s)" in refused(**{"token_embedding.weight": torch.zeros(64, 16, dtype=torch.int64)})
    assert "it has something else for 2 tensor(s)" in refused(**{"token_embedding.weight": 3})
    assert "it has unknown 1 tensor(s), first 'step'" in refused(step=3)
    for path in (weights, tmp_path / "nothing.pth"):
        weights.write_bytes(weights.read_bytes()[:-300])
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_encoder(path, TINY, torch.float32)


def reference_clean(prompt: str) -> str:
    """What the tokenizer of Wan2.1 does with `clean='whitespace'`, step by step."""
    prompt = ftfy.fix_text(prompt)
    prompt = html.unescape(html.unescape(prompt)).strip()
    return re.sub(r"\s+", " ", prompt).strip()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a red\n\n disc\tmoves \r\n", "a red disc moves"),
        ("fish &amp; chips", "fish & chips"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("5 < 6 &amp;amp; 7", "5 < 6 & 7"),  # ftfy leaves entities alone where a < is
        ("a\u00a0wide\u2003space\u3000here", "a wide space here"),
        ("a&nbsp;b", "a b"),
        ("cafÃ© on fire", "café on fire"),
        ("a dog 🐕‍🦺 smiles 😀", "a dog 🐕‍🦺 smiles 😀"),
        ("“quotes” … ﬁne", '"quotes" … fine'),
        ("", ""),
        (" \n\t", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned == reference_clean(prompt)


@given(st.text(st.one_of(st.characters(), st.sampled_from(" \t\n\x0b\x1c\x85\u00a0\u200b\u2028<&;#ampnbsltÃ©â€")), max_size=40))
def test_cleaning_is_the_reference_s(prompt: str) -> None:
    assert clean(prompt) == reference_clean(prompt)


PROMPTS = ["a red disc", "", "  a   red\ndisc &amp; moves ", "a disc " * 9, "ÿ 🐕 unknown", "</s>", "a disc moves a red disc moves a red disc"]


def test_tokens_are_those_of_transformers(network: Any, weights: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids, padding, mask and truncation as transformers' tokenizer gives them; embeddings as its encoder does, with zeros where the mask has."""
    from transformers import PreTrainedTokenizerFast

    file = str(tokenizer / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=text.EOS, pad_token="<pad>", unk_token="<unk>")
    how: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TINY.text_len, "return_tensors": "pt"}
    batch = theirs([reference_clean(prompt) for prompt in PROMPTS], **how)
    with torch.no_grad():
        wanted_BLE = network(batch.input_ids, batch.attention_mask).last_hidden_state * batch.attention_mask[..., None]
    ours = wan_text(weights, tokenizer)
    found_BLE = ours.encode(PROMPTS)
    assert found_BLE.shape == (len(PROMPTS), TINY.text_len, TINY.dim) and found_BLE.dtype == torch.float32
    torch.testing.assert_close(found_BLE, wanted_BLE, rtol=1e-5, atol=1e-5)
    assert torch.equal(found_BLE.abs().sum(-1) > 0, batch.attention_mask.bool())
    whole = [len(theirs(reference_clean(prompt)).input_ids) for prompt in PROMPTS]
    assert [ours.count(prompt) for prompt in PROMPTS] == whole
    long = {clean(prompt): count for prompt, count in zip(PROMPTS, whole, strict=True) if count > TINY.text_len}
    assert long and ours.truncated == long
    ours.encode(PROMPTS)
    assert capsys.readouterr().err.count("its end is cut to leave 12") == len(long)


def test_a_prompt_has_one_embedding_in_any_batch(weights: Path, tokenizer: Path) -> None:
    ours = wan_text(weights, tokenizer)
    for prompt, text_LE in zip(PROMPTS, ours.encode(PROMPTS), strict=True):
        assert torch.equal(text_LE, ours.encode([prompt])[0])
    assert ours.encode([]).shape == (0, TINY.text_len, TINY.dim)


def test_a_tokenizer_that_is_not_umt5_s_is_refused(weights: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match="does not end a text with '</s>', or has more than 30 tokens"):
        wan_text(weights, tokenizer, cfg=UMT5Cfg(vocab=30)).count("a")
    file = tokenizer / "tokenizer.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"post_processor": None}))
    with pytest.raises(UserError, match="does not end a text with '</s>'"):
        wan_text(weights, tokenizer).count("a")
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        wan_text(weights, tokenizer).count("a")
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: there is no such file; fetch it"):
        wan_text(weights, tokenizer).count("a")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that went through the network."""
    lengths: list[int] = []

    def noted(encoder: Any, ids: list[int]) -> Tensor:
        lengths.append(len(ids))
        return embed(encoder, ids)

    monkeypatch.setattr(text, "embed", noted)
    return lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hit_needs_no_weights(weights: Path, tokenizer: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Another process, the file gone: what was encoded comes back bit for bit, and what was not is refused."""
    digest, cache = sha256_of([weights]), tmp_path / "cache"
    before = wan_text(weights, tokenizer, cache, dtype=dtype)
    first = before.encode(PROMPTS)
    assert len(list(cache.iterdir())) == len({clean(prompt) for prompt in PROMPTS})
    weights.unlink()
    again = wan_text(weights, tokenizer, cache, dtype=dtype, sha256=digest)
    assert torch.equal(again.encode(PROMPTS), first)
    assert again.truncated == before.truncated != {}
    with pytest.raises(UserError, match="there is no such file"):
        again.encode(["a new one"])


def test_every_prompt_is_encoded_once(weights: Path, tokenizer: Path, tmp_path: Path, embedded: list[int]) -> None:
    ours = wan_text(weights, tokenizer, tmp_path / "cache")
    for _ in range(3):
        ours.encode(["a disc", "a  disc\n", "a red disc", "a disc"])
    assert embedded == [3, 4]
    assert [sum(1 for _ in entry.open("rb")) > 0 for entry in (tmp_path / "cache").iterdir()] == [True, True]


def test_an_entry_holds_the_valid_rows_alone(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    rows = wan_text(weights, tokenizer, tmp_path / "cache").encode([" a disc "])
    (entry,) = (tmp_path / "cache").iterdir()
    with safe_open(entry, "pt") as file:
        assert torch.equal(file.get_tensor("rows"), rows[0, :3])
        assert json.loads(file.metadata()["about"])["prompt"] == "a disc"


def test_what_the_embedding_depends_on_is_in_the_key(weights: Path, tokenizer: Path, tmp_path: Path, embedded: list[int]) -> None:
    cache = tmp_path / "cache"

    def misses(**how: Any) -> int:
        before = len(embedded)
        wan_text(weights, tokenizer, cache, **how).encode(["a disc"])
        return len(embedded) - before

    assert (misses(), misses()) == (1, 0)
    assert (misses(dtype=torch.bfloat16), misses(dtype=torch.bfloat16)) == (1, 0)
    assert misses(cfg=UMT5Cfg(**vars(TINY) | {"text_len": 2})) == 1
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text().replace('"▁disc"', '"▁dish"'))
    assert (misses(), misses()) == (1, 0)
    tensors = torch.load(weights)
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, weights)
    assert (misses(), misses()) == (1, 0)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("spoil", [lambda content: b"", lambda content: content[:-5], lambda content: b"\xff" * 50, flip])
def test_a_damaged_entry_is_made_again(weights: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any) -> None:
    ours = wan_text(weights, tokenizer, tmp_path / "cache")
    first = ours.encode(["a disc"])
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(spoil(whole))
    assert torch.equal(ours.encode(["a disc"]), first)
    assert "is damaged; its prompt is encoded again" in capsys.readouterr().err
    assert entry.read_bytes() == whole and len(list((tmp_path / "cache").iterdir())) == 1
    ours.encode(["a disc"])
    assert "damaged" not in capsys.readouterr().err


def test_an_entry_of_another_prompt_is_not_believed(weights: Path, tokenizer: Path, tmp_path: Path) -> None:
    ours, cache = wan_text(weights, tokenizer, tmp_path / "cache"), tmp_path / "cache"
    first = ours.encode(["a disc"])
    (entry,) = cache.iterdir()
    ours.encode(["a red disc"])
    (other,) = set(cache.iterdir()) - {entry}
    entry.write_bytes(other.read_bytes())
    assert torch.equal(ours.encode(["a disc"]), first)


def test_weights_that_are_not_those_that_were_named_are_refused(weights: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"has sha256 .* instead of 000000000000"):
        wan_text(weights, tokenizer, sha256="0" * 64).encode(["a disc"])


def test_the_encoder_can_be_given_back(weights: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []

    def noted(path: Path, cfg: UMT5Cfg, dtype: torch.dtype) -> Any:
        loads.append(path)
        return load_encoder(path, cfg, dtype)

    monkeypatch.setattr(text, "load_encoder", noted)
    ours = wan_text(weights, tokenizer)
    assert ours.count("a disc") == 3 and not loads
    first: Tensor = ours.encode(["a disc"])
    ours.encode(["a red disc"])
    assert len(loads) == 1
    ours.release()
    ours.release()
    assert torch.equal(ours.encode(["a disc"]), first) and len(loads) == 2
