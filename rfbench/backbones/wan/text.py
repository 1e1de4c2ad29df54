"""The text encoder of the Wan family: prompts to UMT5-XXL embeddings, and a cache on disk that spares loading the encoder.

The network is transformers' UMT5EncoderModel, the arithmetic that of the public code (Wan-Video/Wan2.1, wan/modules/t5.py and tokenizers.py).
Padding is masked there, so a row depends on its own prompt alone; here each prompt is encoded by itself and without padding, which
gives the same embedding in any batch. Shapes: B prompts, L = text_len, n tokens of one prompt, E width.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfbench.config import WeightsCfg
from rfbench.errors import UserError
from rfbench.progress import Progress, say
from rfbench.records import atomic, canonical, fingerprint
from rfbench.weight_files import files_of, sha256_of
from rfbench.weights import FLOATS, load_into, read_tensors, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "</s>"
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one tensor under two names
PARTS = {  # of a block, in the original checkpoint -> in transformers' layers
    "norm1": "0.layer_norm",
    **{f"attn.{side}": f"0.SelfAttention.{side}" for side in "qkvo"},
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}


@dataclass(frozen=True)
class UMT5Cfg:
    """Sizes of the encoder; `text_len` is what every prompt is padded or cut to."""

    vocab: int = 256384
    dim: int = 4096
    head_dim: int = 64
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # from which on all distances share a bucket
    eps: float = 1e-6
    text_len: int = 512


UMT5_XXL = UMT5Cfg()


def clean(prompt: str) -> str:
    """A prompt as the reference hands it to the tokenizer: mojibake mended, HTML entities resolved twice, runs of white space made one space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def key_map(layers: int) -> dict[str, str]:
    """Name in `models_t5_umt5-xxl-enc-bf16.pth` -> name in transformers, of all 10 tensors per layer and the other 2."""
    blocks = {f"blocks.{i}.{ours}.weight": f"encoder.block.{i}.layer.{theirs}.weight" for i in range(layers) for ours, theirs in PARTS.items()}
    return {"token_embedding.weight": EMBEDDING, "norm.weight": "encoder.final_layer_norm.weight"} | blocks


def to_transformers(tensors: Mapping[str, Tensor], layers: int, *, where: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in either layout by transformers' names, the embedding once.

    Raises:
        UserError: a name is of neither layout, or missing; or the two embeddings of a checkpoint differ.
    """
    names = key_map(layers)
    if EMBEDDING in tensors or TIED in tensors:
        names = {name: name for name in names.values()}
        embedding = tensors.get(EMBEDDING, tensors.get(TIED))
        assert embedding is not None
        if TIED in tensors and not torch.equal(tensors[TIED], embedding):
            raise UserError(f"{where} has two different embeddings, '{EMBEDDING}' and '{TIED}': it is not a UMT5 encoder")
        tensors = {name: tensor for name, tensor in tensors.items() if name != TIED} | {EMBEDDING: embedding}
    for what, found in (("lacks", names.keys() - tensors.keys()), ("has unknown", tensors.keys() - names.keys())):
        if found:
            raise UserError(f"{where} is not a UMT5 encoder of {layers} layers: it {what} {len(found)} tensor(s), first '{min(found)}'")
    return {theirs: tensors[ours] for ours, theirs in names.items()}


def empty_encoder(cfg: UMT5Cfg) -> Any:
    """transformers' UMT5EncoderModel of these sizes on the meta device."""
    from transformers import UMT5Config, UMT5EncoderModel

    about = UMT5Config(
        vocab_size=cfg.vocab,
        d_model=cfg.dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.ffn_dim,
        num_layers=cfg.layers,
        num_heads=cfg.heads,
        relative_attention_num_buckets=cfg.buckets,
        relative_attention_max_distance=cfg.max_distance,
        layer_norm_epsilon=cfg.eps,
        feed_forward_proj="gated-gelu",
    )
    about._attn_implementation = "eager"  # softmax in float32 over scores in the weights' dtype, as in the reference
    with torch.device("meta"):
        return UMT5EncoderModel(about)


def load_encoder(weights: Path, cfg: UMT5Cfg, dtype: torch.dtype) -> Any:
    """The encoder with its weights, on the CPU and without gradients. Tensors of `dtype` stay where the file is mapped: nothing is copied.

    Raises:
        UserError: a file is missing or corrupt, or names, shapes or values are not those of this encoder.
    """
    tensors = to_transformers(read_tensors(weights, WeightsCfg(weights.name)), cfg.layers, where=weights)
    embedding = tensors[EMBEDDING]
    if isinstance(embedding, Tensor) and embedding.dtype in FLOATS:
        embedding = embedding.to(dtype)  # once for both of its names
    tensors[EMBEDDING] = tensors[TIED] = embedding
    encoder = empty_encoder(cfg).to(dtype)
    load_into(encoder, tensors, where=weights)
    encoder.encoder.set_input_embeddings(encoder.shared)
    return encoder.requires_grad_(False).eval()


def embed(encoder: Any, ids: Sequence[int]) -> Tensor:
    """Embedding [n, E] of one prompt's tokens, by `load_encoder`'s model on its device."""
    with torch.no_grad():
        rows_nE: Tensor = encoder(torch.tensor([ids], device=encoder.device)).last_hidden_state[0]
    return rows_nE


class WanText:
    """Prompts to embeddings. What is in the cache needs neither encoder nor tokenizer loaded; the first miss loads them.

    `weights` is the original .pth file or a transformers directory, `tokenizer` a directory with `tokenizer.json`. `sha256` is that of the
    weights (`weight_files.sha256_of`) where it is known: the cache's entries are named after it, so that a hit works without the file; on a miss it
    is checked.

    An entry is `<key>.safetensors`, `rows` [n, E] with the prompt in its header; the key is a hash of all that the embedding depends on.
    """

    def __init__(
        self, weights: Path, tokenizer: Path, cache: Path | None, *, dtype: torch.dtype, cfg: UMT5Cfg = UMT5_XXL, sha256: str | None = None
    ) -> None:
        self.weights, self.tokenizer, self.cache, self.dtype, self.cfg, self.sha256 = weights, tokenizer, cache, dtype, cfg, sha256
        self.truncated: dict[str, int] = {}  # cleaned prompt -> its tokens, of the prompts that were too long

    def encode(self, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> Tensor:
        """Embeddings [B, L, E] on `device`, where the encoder runs if it has to; rows behind a prompt's last token are zero.

        A prompt of more than L tokens loses its end, as in the reference; that is said once and noted in `truncated`.

        Raises:
            UserError: weights or tokenizer are missing or not what they should be; the cache cannot be written (code 1).
        """
        cleaned = [clean(prompt) for prompt in prompts]
        rows = {prompt: self._rows(prompt, device) for prompt in dict.fromkeys(cleaned)}
        text_BLE = torch.zeros(len(prompts), self.cfg.text_len, self.cfg.dim, dtype=self.dtype, device=device)
        for text_LE, prompt in zip(text_BLE, cleaned, strict=True):
            text_LE[: len(rows[prompt])] = rows[prompt]
        return text_BLE

    def count(self, prompt: str) -> int:
        """Tokens of a prompt with the `</s>` at its end, also of one that is too long.

        Raises:
            UserError: the tokenizer is missing or not UMT5's.
        """
        return len(self._tokenizer.encode(clean(prompt)).ids)

    def remember(self, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> None:
        """Put the embeddings of prompts into the cache on disk, those that are not there yet, then give the encoder's memory back.

        Raises:
            UserError: as `encode`.
        """
        assert self.cache is not None, "without a cache there is nowhere to put them"
        missing = [prompt for prompt in dict.fromkeys(map(clean, prompts)) if not (self.cache / f"{self._key(prompt)}.safetensors").exists()]
        if missing:
            with Progress("embedding prompts", len(missing)) as progress:
                for prompt in missing:
                    self._rows(prompt, device)
                    progress.advance()
        self.release()

    def release(self) -> None:
        """Give the encoder's memory back; the next prompt that is not in the cache loads it again."""
        self.__dict__.pop("_encoder", None)

    def _rows(self, prompt: str, device: torch.device | str) -> Tensor:
        file = self.cache and self.cache / f"{self._key(prompt)}.safetensors"
        found = self._read(file, prompt) if file and file.exists() else None
        if found is None:
            ids = self._tokenizer.encode(prompt).ids
            kept = ids if len(ids) <= self.cfg.text_len else [*ids[: self.cfg.text_len - 1], ids[-1]]
            found = embed(self._encoder.to(device), kept), len(ids)
            if file:
                _write(file, found[0].cpu(), prompt, len(ids))
        rows_nE, tokens = found
        if tokens > self.cfg.text_len and prompt not in self.truncated:
            self.truncated[prompt] = tokens
            say(f"a prompt has {tokens} tokens; its end is cut to leave {self.cfg.text_len}, as the model's own code does: '{prompt[:60]}'")
        return rows_nE.to(device)

    def _key(self, prompt: str) -> str:
        cfg = self.cfg
        about = {"encoder": self._encoder_sha256, "tokenizer": self._tokenizer_sha256, "prompt": prompt}
        return fingerprint(about | {"text_len": cfg.text_len, "dtype": str(self.dtype)})

    def _read(self, file: Path, prompt: str) -> tuple[Tensor, int] | None:
        """Rows and number of tokens of an entry; None if it is not what was written, which is said."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as entry:
                about, rows_nE = json.loads(entry.metadata()["about"]), entry.get_tensor("rows")
            fits = rows_nE.dtype == self.dtype and rows_nE.shape == (min(about["tokens"], self.cfg.text_len), self.cfg.dim)
            whole = fits and about == _about(rows_nE, prompt, about["tokens"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return rows_nE, about["tokens"]
        say(f"{file} is damaged; its prompt is encoded again")
        return None

    @functools.cached_property
    def _encoder_sha256(self) -> str:
        return self.sha256 or self._actual_sha256()

    @functools.cached_property
    def _tokenizer_sha256(self) -> str:
        return sha256_of([self._tokenizer_file])

    @property
    def _tokenizer_file(self) -> Path:
        file = self.tokenizer / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"tokenizer {file}: there is no such file; fetch it")
        return file

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """UMT5's own, as tokenizer.json has it."""
        file = self._tokenizer_file
        tokenizer = read_tokenizer(file)
        if tokenizer.encode("").ids != [tokenizer.token_to_id(EOS)] or tokenizer.get_vocab_size() > self.cfg.vocab:
            raise UserError(f"{file} is not UMT5's: it does not end a text with '{EOS}', or has more than {self.cfg.vocab} tokens")
        return tokenizer

    def _actual_sha256(self) -> str:
        if not self.weights.exists():
            raise UserError(f"text encoder {self.weights}: there is no such file; fetch it")
        return sha256_of(files_of(self.weights))

    @functools.cached_property
    def _encoder(self) -> Any:
        if self.sha256 is not None and (actual := self._actual_sha256()) != self.sha256:
            raise UserError(f"{self.weights} has sha256 {actual[:12]}... instead of {self.sha256[:12]}...: it was altered or its download broke")
        return load_encoder(self.weights, self.cfg, self.dtype)


def _about(rows_nE: Tensor, prompt: str, tokens: int) -> dict[str, Any]:
    """What the header of a cache entry says, with a hash of the rows because the format has no checksum."""
    return {"prompt": prompt, "tokens": tokens, "sha256": hashlib.sha256(rows_nE.contiguous().view(torch.uint8).numpy().data).hexdigest()}


def _write(file: Path, rows_nE: Tensor, prompt: str, tokens: int) -> None:
    from safetensors.torch import save_file

    with atomic(file) as temporary:
        save_file({"rows": rows_nE.contiguous()}, temporary, {"about": canonical(_about(rows_nE, prompt, tokens))})
