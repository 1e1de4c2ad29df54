"""Seeded random weights in place of the files, through vbench's own constructors: to compare drivers where no weights can be had.

Rows that were made so say it in their version. What stands between a constructor and its file is patched for the time of the
block: torch.load and load_state_dict, the downloads, CLIP's and torch.hub's loaders, and BERT's tokenizer and weights.
"""

from __future__ import annotations

import contextlib
import string
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

MARK = "drawn"
CLIPS = {"B": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12), "L": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12)}

BOXES = 2  # of a frame, for which drawn weights find words; they are sure of some two hundred
SAID = ("person", "dog", "cat", "red", "car")  # words that its labels have more often than others, so that there are some to be asked for
LIKELY, ENDS = 3.5, 20.0  # logits of these words and of the end of a text, among 30,522 whose largest is about 4


class Drawn(dict[str, Any]):
    """Stands for a checkpoint, at any depth of it."""

    def __missing__(self, key: str) -> Drawn:
        return self


def draw(network: nn.Module, seed: int) -> nn.Module:
    """Fill a network: matrices with variance 1 / fan-in, vectors near to the constant that its constructor put there; returns it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                reach = (3 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-reach, reach, generator=rng)
            elif parameter.dim() == 1:
                constant = float(parameter[0]) if len(parameter) > 1 and bool((parameter == parameter[0]).all()) else 0.0
                parameter.uniform_(constant - 0.1, constant + 0.1, generator=rng)
    return network


def draw_judge(network: Any, seed: int) -> None:
    """MUSIQ whose scores are in the middle of 0 to 100, where scores can be."""
    draw(network, seed)
    with torch.no_grad():
        list(network.head.parameters())[-1].fill_(50.0)


def draw_captioner(network: Any, seed: int) -> Any:
    """Tag2Text that says something else of another image, and ends its captions where it may."""
    draw(network, seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("crossattention.output.dense.weight"):
                parameter.mul_(20)
        network.text_decoder.cls.predictions.bias[network.tokenizer.sep_token_id] = ENDS
    return network


def draw_detector(network: Any, seed: int) -> Any:
    """GRiT that finds a few boxes in a frame, and for each about as many words as a label or a description has."""
    draw(network, seed)
    heads = network.roi_heads
    for predictor in heads.box_predictor:
        predictor.test_topk_per_image = BOXES
    heads.text_decoder.beamsearch_decode.max_steps = 4 if heads.test_task == "ObjectDet" else 8
    with torch.no_grad():
        heads.text_decoder.textual.output.bias[[heads.tokenizer.sep_token_id, *heads.tokenizer.convert_tokens_to_ids(list(SAID))]] = LIKELY
    return network


@contextlib.contextmanager
def random_weights(seed: int) -> Iterator[None]:
    """Inside the block vbench's constructors give networks that are the same for the same seed, and fetch nothing."""
    import clip
    import clip.model
    import timm
    import vbench.utils
    from pyiqa.archs import musiq_arch
    from transformers import BertTokenizer
    from vbench import aesthetic_quality
    from vbench.third_party.tag2Text import tag2text

    load_state_dict = nn.Module.load_state_dict

    def load(self: nn.Module, state: Any, *args: Any, **named: Any) -> Any:
        return draw(self, seed) if MARK in state else load_state_dict(self, state, *args, **named)

    def clip_load(name: str, device: Any = "cpu", **_: Any) -> tuple[nn.Module, None]:
        return draw(clip.model.CLIP(*CLIPS["L" if "ViT-L" in name else "B"]), seed).to(device).eval(), None

    def hub_load(*_: Any, **__: Any) -> nn.Module:
        """DINO's code is not part of vbench: the same architecture from timm."""
        network = timm.create_model("vit_base_patch16_224.dino", pretrained=False, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
        return draw(network, seed).eval()

    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        words = _vocabulary(Path(folder), tag2text.tra_array)
        for target, name, value in (
            (torch, "load", lambda *_, **__: Drawn({MARK: None})),
            (torch.hub, "load", hub_load),
            (nn.Module, "load_state_dict", load),
            (clip, "load", clip_load),
            (vbench.utils, "subprocess", types.SimpleNamespace(run=lambda *_, **__: None)),
            (musiq_arch, "load_pretrained_network", lambda network, *_, **__: draw_judge(network, seed)),
            (aesthetic_quality, "get_aesthetic_model", lambda _: draw(nn.Linear(768, 1), seed)),
            (tag2text, "load_checkpoint_swinbase", lambda network, *_: (draw_captioner(network, seed), None)),
            (tag2text.BertModel, "from_pretrained", lambda _, config, **named: tag2text.BertModel(config, **named)),
            (BertTokenizer, "from_pretrained", lambda *_, **__: BertTokenizer(words)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        with contextlib.suppress(ImportError):
            from detectron2.checkpoint import DetectionCheckpointer

            stack.enter_context(mock.patch.object(DetectionCheckpointer, "load", lambda self, *_, **__: draw_detector(self.model, seed) and {}))
        yield


def _vocabulary(folder: Path, tags: Any) -> str:
    """A vocabulary file of BERT's size in its layout: special tokens, letters, the words of the tags, and filling."""
    special = ["[PAD]", *(f"[unused{k}]" for k in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [mark + letter for letter in string.ascii_lowercase + string.digits + "|'-./" for mark in ("", "##")]
    words = sorted({word for tag in tags for word in str(tag).lower().split()} | {*SAID, "a", "picture", "of", "the", "with"})
    tokens = list(dict.fromkeys([*special, *letters, *words]))
    tokens += [f"filler{k}" for k in range(30522 - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return str(folder / "vocab.txt")
