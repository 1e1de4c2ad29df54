"""NOVA's own package with a tiny model of random weights, for test_runners.py.

    NOVA_PYTHON tests/nova_inside.py FOLDER      writes the model as upstream publishes one

As a runner file it is that of rfbench, in a process that knows the sizes of the tiny networks.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).resolve().parents[1] / "rfbench" / "runners" / "nova.py"
SIDE = 64  # pixels


def declare() -> None:
    """Networks are chosen by name; this is one more."""
    from diffnext.models.transformers import transformer_nova as nova

    nova.VIDEO_ENCODERS.register("tiny", depth=2, embed_dim=64, num_heads=2)(nova.video_encoder)
    nova.IMAGE_ENCODERS.register("tiny", depth=2, embed_dim=64, num_heads=2)(nova.image_encoder)
    nova.IMAGE_DECODERS.register("tiny", depth=2, embed_dim=64)(nova.image_decoder)


def load(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    declare()
    spec = importlib.util.spec_from_file_location("nova_runner", RUNNER)
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    found: Callable[[dict[str, Any]], dict[str, Any]] = runner.load(settings)
    return found


def write(folder: str) -> None:
    """All parts at a size that a CPU has done with in seconds; the model takes text of a few words."""
    import tokenizers
    import torch
    from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
    from diffnext.models.text_encoders.phi import PhiEncoderModel
    from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
    from diffnext.pipelines import NOVAPipeline
    from diffnext.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import PhiConfig, PreTrainedTokenizerFast

    declare()
    torch.manual_seed(0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "disc": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    grid, blocks = SIDE // 16, ["3D"] * 4
    parts = {
        "transformer": NOVATransformer3DModel(
            *(4, [SIDE, SIDE], 8, 64, 16, [grid, grid], [16, grid // 2, grid // 2]),
            arch=["tiny"] * 3,
        ),
        "scheduler": DDPMScheduler(),
        "vae": AutoencoderKLOpenSora(3, 3, blocks, blocks, [32] * 4, layers_per_block=1, latent_channels=4),
        "text_encoder": PhiEncoderModel(PhiConfig(vocab_size=8, **size)),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"),
    }
    NOVAPipeline(**parts).save_pretrained(folder)
    index = Path(folder) / "model_index.json"
    where = {name: [type(part).__module__, type(part).__name__] for name, part in parts.items()}
    index.write_text(json.dumps(json.loads(index.read_text()) | where))


if __name__ == "__main__":
    write(sys.argv[1])
