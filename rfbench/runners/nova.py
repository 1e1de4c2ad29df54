"""NOVA (baaivision/NOVA, package `diffnext`).

settings: weights, height and width (which the weights fix), steps [autoregressive, diffusion], guidance_scale, motion_flow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def load(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import numpy as np
    import torch
    from diffnext.pipelines import NOVAPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = NOVAPipeline.from_pretrained(settings["weights"], torch_dtype=dtype, trust_remote_code=True).to(device)

    def run(item: dict[str, Any]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(item["seed"])
        generator = torch.Generator(device).manual_seed(item["seed"])
        autoregressive, diffusion = settings["steps"]
        begun = time.perf_counter()
        frames_THWC = pipe(
            item["prompt"],
            max_latent_length=(item["frames"] - 1) // 4 + 1,
            num_inference_steps=autoregressive,
            num_diffusion_steps=diffusion,
            guidance_scale=settings["guidance_scale"],
            motion_flow=settings["motion_flow"],
            generator=generator,
            disable_progress_bar=True,
            output_type="np",
        ).frames[0]
        seconds = time.perf_counter() - begun
        np.save(item["out"], frames_THWC)
        return {"stamps": [[seconds, len(frames_THWC)]], "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}

    return run
