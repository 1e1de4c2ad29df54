"""What other programs call the tensors of a Wan DiT: training wrappers, diffusers, PEFT; and the way to the checkpoints' own names.

Only names are changed; no layout splits, joins or transposes a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # put by FSDP, checkpointing and torch.compile, anywhere in a name
ADAPTER = re.compile(r"(?:base_model\.model\.)?(?P<part>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

# diffusers' name of a part -> the original one, outside and inside of a block. Parts with equal names are not listed.
OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "fps_projection.net.0.proj": "fps_projection.0",  # of SkyReels-V2-DF
    "fps_projection.net.2": "fps_projection.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
INSIDE = {
    "norm2": "norm3",  # both have norm1 to norm3; diffusers counts in the order of use, and one alone has weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
} | {
    f"{theirs}.{part}": f"{ours}.{own}"
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for part, own in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
}
PARTS = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<part>.+?)(?P<kind>\.weight|\.bias)?")


def unwrapped(name: str) -> str:
    """The name without what training wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether tensors are named as diffusers' WanTransformer3DModel or SkyReelsV2Transformer3DModel names them."""
    return any(name.startswith("condition_embedder.") for name in names)


def from_diffusers(name: str) -> str:
    """The original name of a tensor of diffusers; a name that is not one of its comes back as it is."""
    return _renamed(name, OUTSIDE, INSIDE)


def to_diffusers(name: str) -> str:
    """diffusers' name of a tensor: the inverse of `from_diffusers`."""
    return _renamed(name, {ours: theirs for theirs, ours in OUTSIDE.items()}, {ours: theirs for theirs, ours in INSIDE.items()})


def _renamed(name: str, outside: dict[str, str], inside: dict[str, str]) -> str:
    found = PARTS.fullmatch(name)
    if found is None:
        return name
    block, part, kind = found["block"] or "", found["part"], found["kind"] or ""
    return block + (inside if block else outside).get(part, part) + kind
