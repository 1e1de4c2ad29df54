"""MAGI-1 (SandAI-org/MAGI-1, package `inference`): its frames come chunk by chunk, and are stamped as they come.

settings: weights, t5, vae (folders), source (where the repository's folder is), config (its example to start from), height, width, fps, steps [n].
The repository's pipeline loads the model anew for every prompt; here the functions that it calls share one.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLES = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "GPUS_PER_NODE": "1", "NNODES": "1", "PAD_HQ": "1", "PAD_DURATION": "1"}


def load(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    os.environ.update(VARIABLES, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    os.chdir(Path(settings["source"]) / "MAGI-1")  # its special tokens are found from there
    import numpy as np
    import torch
    from inference.common import set_random_seed
    from inference.model.dit import get_dit
    from inference.pipeline import MagiPipeline
    from inference.pipeline.prompt_process import get_txt_embeddings
    from inference.pipeline.video_generate import generate_per_chunk
    from inference.pipeline.video_process import post_chunk_process

    cfg = json.loads(Path(settings["config"]).read_text())
    cfg["runtime_config"].update(
        load=settings["weights"],
        t5_pretrained=settings["t5"],
        vae_pretrained=settings["vae"],
        video_size_h=settings["height"],
        video_size_w=settings["width"],
        fps=settings["fps"],
        num_steps=settings["steps"][0],
    )
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(cfg, file)
        file.flush()
        config = MagiPipeline(file.name).config
    model = get_dit(config)

    def run(item: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.reset_peak_memory_stats()
        config.runtime_config.num_frames = model.runtime_config.num_frames = item["frames"]
        set_random_seed(item["seed"] % 2**32)  # numpy takes no more
        chunks, stamps = [], []
        begun = time.perf_counter()
        embeddings, masks = get_txt_embeddings(item["prompt"], config)
        for latent in generate_per_chunk(model=model, prefix_video=None, caption_embs=embeddings, emb_masks=masks):
            chunks.append(post_chunk_process(latent, config).permute(0, 2, 3, 1).cpu().numpy())
            stamps.append([time.perf_counter() - begun, len(chunks[-1])])
        np.save(item["out"], np.concatenate(chunks))
        return {"stamps": stamps, "peak_bytes": torch.cuda.max_memory_allocated()}

    return run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
