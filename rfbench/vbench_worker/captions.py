"""Scene: whether Tag2Text's captions of 16 frames name it.

vbench's decoder passes on neither what it knows of earlier words (it takes them under a name that transformers no longer uses) nor
the keys and values of the image, which are the same for every word. Both are kept here.

With the transformers that vbench pins, the images of a batch are repeated for the three beams twice, once by Tag2Text and once by
`generate`, and the attention takes the first of them, as many as there are beams: the caption of frame i is that of frame i // 3.
So vbench's scores look at the first third of the 16 frames only. It defines the score, and the other frames are not looked at here.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfbench.vbench_worker import networks, rules
from rfbench.vbench_worker.fast import Networks, Result
from rfbench.vbench_worker.video import Footage

EXPANSION = 3  # beams of Tag2Text's search


class Scene:
    def __init__(self, nets: Networks) -> None:
        from vbench.utils import tag2text_transform

        self.nets, self.network, self.look = nets, nets.get("tag2text"), tag2text_transform(384)
        decoder = self.network.text_decoder
        decoder.prepare_inputs_for_generation = types.MethodType(_with_past, decoder)
        for module in decoder.modules():
            if type(module).__name__ == "BertLayer" and hasattr(module, "crossattention"):
                module.crossattention.self.forward = types.MethodType(_cross_attention, module.crossattention.self)

    def captions(self, frame_THWC: Any) -> list[str]:
        """One caption per frame, each of them the caption of the frame at a third of its place: see the module."""
        seen = (len(frame_THWC) + EXPANSION - 1) // EXPANSION
        different, back = np.unique(frame_THWC[:seen], axis=0, return_inverse=True)
        image_TCHW = torch.stack([self.look(frame) for frame in different]).to(self.nets.device)
        found = networks.module("scene").get_caption(self.network, image_TCHW)
        return [found[back.reshape(-1)[place // EXPANSION]] for place in range(len(frame_THWC))]

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        captions = self.captions(clip.decord_384)
        frames = [rules.in_scene(about["scene"]["scene"], caption) for caption in captions]
        return Result(sum(frames) / len(frames), len(frames), {"captions": captions})


def _with_past(self: Any, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, **model_kwargs: Any) -> dict[str, Any]:
    """The inputs of a step: the new word alone, beside what is known of the others."""
    if past_key_values is None:
        _forget(self)
    return {
        "input_ids": input_ids if past_key_values is None else input_ids[:, -1:],
        "attention_mask": input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask,
        "past_key_values": past_key_values,
        "encoder_hidden_states": model_kwargs.get("encoder_hidden_states"),
        "encoder_attention_mask": model_kwargs.get("encoder_attention_mask"),
        "is_decoder": True,
    }


def _forget(decoder: Any) -> None:
    for module in decoder.modules():
        if hasattr(module, "image_keys_values"):
            del module.image_keys_values


def _cross_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    head_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """Attention of words to the image, whose keys and values are computed at the first word, from one image for each beam of its frame."""
    if not hasattr(self, "image_keys_values"):
        image = encoder_hidden_states[:: len(encoder_hidden_states) // len(hidden_states)]
        self.image_keys_values = tuple(self.transpose_for_scores(layer(image)) for layer in (self.key, self.value))
    key, value = self.image_keys_values
    out = torch.nn.functional.scaled_dot_product_attention(self.transpose_for_scores(self.query(hidden_states)), key, value)
    out = out.permute(0, 2, 1, 3).contiguous()
    return out.view(*out.shape[:-2], self.all_head_size), (key, value)
