"""Pyramid Flow (jy0205/Pyramid-Flow, package `pyramid_dit`).

settings: weights, model_name (pyramid_mmdit, pyramid_flux), model_variant, height, width, steps (first frame's and the video's, three stages each),
guidance_scale, video_guidance_scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def load(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import numpy as np
    import torch
    from pyramid_dit import PyramidDiTForVideoGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PyramidDiTForVideoGeneration(settings["weights"], "bf16", model_name=settings["model_name"], model_variant=settings["model_variant"])
    for part in (model.vae, model.dit, model.text_encoder):
        part.to(device)
    model.vae.enable_tiling()

    def run(item: dict[str, Any]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(item["seed"])  # it adds noise between its stages, from torch's own generator
        steps = list(settings["steps"])
        begun = time.perf_counter()
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            pictures = model.generate(
                prompt=item["prompt"],
                num_inference_steps=steps[:3],
                video_num_inference_steps=steps[3:],
                height=settings["height"],
                width=settings["width"],
                temp=(item["frames"] - 1) // 8 + 1,
                guidance_scale=settings["guidance_scale"],
                video_guidance_scale=settings["video_guidance_scale"],
                generator=torch.Generator(device).manual_seed(item["seed"]),
                output_type="pil",
                save_memory=True,
            )
        seconds = time.perf_counter() - begun
        frames_THWC = np.stack([np.asarray(picture) for picture in pictures])
        np.save(item["out"], frames_THWC)
        return {"stamps": [[seconds, len(frames_THWC)]], "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}

    return run
