"""A text-to-video pipeline of diffusers.

settings: weights (a folder of diffusers'), index (its model_index.json, where weights are a part of that folder), pipeline (its class),
dtype of all but the VAE, height, width, steps [n], call (further arguments), flow_shift (for UniPC, where the folder's scheduler has another one).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def load(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import diffusers
    import numpy as np
    import torch

    folder = os.path.dirname(settings["index"]) if "index" in settings else settings["weights"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"vae": torch.float32, "default": getattr(torch, settings["dtype"])}
    pipe = getattr(diffusers, settings["pipeline"]).from_pretrained(folder, torch_dtype=dtypes)
    if "flow_shift" in settings:
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=settings["flow_shift"])
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def run(item: dict[str, Any]) -> dict[str, Any]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(item["seed"])  # for what does not take the generator
        generator = torch.Generator(device).manual_seed(item["seed"])
        size = {"height": settings["height"], "width": settings["width"], "num_frames": item["frames"]}
        how = {"num_inference_steps": settings["steps"][0], "generator": generator, "output_type": "np", **settings.get("call", {})}
        begun = time.perf_counter()
        frames_THWC = pipe(prompt=item["prompt"], **size, **how).frames[0]
        seconds = time.perf_counter() - begun
        if not np.isfinite(frames_THWC).all():
            raise ValueError("what the model made is not finite")
        np.save(item["out"], (frames_THWC * 255).round().clip(0, 255).astype(np.uint8))
        return {"stamps": [[seconds, len(frames_THWC)]], "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}

    return run
