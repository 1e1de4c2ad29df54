"""GRiT's words for boxes: the same search by the same layers, which read each box once.

vbench's decoder runs over the 196 features of a box and all words so far again for every word. But no feature sees a word, and no
word a later one: what a layer makes of them for the next word is what it made for the last. Here each layer's keys and values are
kept, those of the features also from the descriptions to the labels of the same boxes. Legend: B boxes, L places, D features.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Reader:
    """The decoder's layers over features that do not change; in the place of both decoders' `infer`, which share the layers."""

    def __init__(self, heads: Any) -> None:
        self.textual = heads.text_decoder.textual
        self.layers = self.textual.transformer.encoder.layer
        self._box_BLD: Tensor | None = None
        self._read: list[tuple[Tensor, Tensor]] = []
        for decoder in (heads.text_decoder, heads.text_decoder_det):
            decoder.infer = types.MethodType(lambda decoder, box_BLD: self.infer(decoder, box_BLD), decoder)
        for layer in self.layers:
            layer.intermediate.intermediate_act_fn = F.gelu  # the same function in one step

    def infer(self, decoder: Any, box_BLD: Tensor) -> dict[str, Tensor]:
        """What GRiTTextDecoder.infer gives, by its own search, which asks for one word after another."""
        if self._box_BLD is None or not torch.equal(self._box_BLD, box_BLD):
            self._box_BLD, self._read = box_BLD, self._features(box_BLD)
        said = [(key, value) for key, value in self._read]
        begin_B1 = torch.full((len(box_BLD), 1), decoder.begin_token_id, dtype=torch.long, device=box_BLD.device)
        predictions, logprobs = decoder.beamsearch_decode.search(begin_B1, lambda words_BL: self._next(words_BL, said))
        return {"predictions": predictions, "logprobs": logprobs}

    def _features(self, box_BLD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the features in each layer: they attend to each other alone."""
        state_BLD, read = self.textual.object_feature_projection(box_BLD), []
        for layer in self.layers:
            pair = self._keys_values(layer, state_BLD)
            read.append(pair)
            if layer is not self.layers[-1]:
                state_BLD = self._layer(layer, state_BLD, pair)
        return read

    def _next(self, words_BL: Tensor, said: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits of the word after `words_BL`, of which all but the last have been seen before."""
        known = self.textual.embedding
        place = words_BL.shape[-1] - 1
        state_BLD = known.layer_norm(known.words(words_BL[:, -1:]) + known.positions.weight[place])
        for number, layer in enumerate(self.layers):
            key, value = self._keys_values(layer, state_BLD)
            said[number] = torch.cat((said[number][0], key), 2), torch.cat((said[number][1], value), 2)
            state_BLD = self._layer(layer, state_BLD, said[number])
        return self.textual.output(state_BLD[:, -1]).float()

    @staticmethod
    def _keys_values(layer: Any, state_BLD: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.attention.self
        return attention.transpose_for_scores(attention.key(state_BLD)), attention.transpose_for_scores(attention.value(state_BLD))

    @staticmethod
    def _layer(layer: Any, state_BLD: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        attention = layer.attention.self
        seen = F.scaled_dot_product_attention(attention.transpose_for_scores(attention.query(state_BLD)), *pair)
        state_BLD = layer.attention.output(seen.transpose(1, 2).flatten(2), state_BLD)
        return layer.output(layer.intermediate(state_BLD), state_BLD)
