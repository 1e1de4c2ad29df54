"""VideoReward (KwaiVGI VideoAlign, arXiv:2501.13918): visual quality, motion quality and text alignment of a clip, by a Qwen2-VL-2B
that answers at three special tokens of its prompt. `frames` makes its input, `network` its weights, `model` puts them together."""
