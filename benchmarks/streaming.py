"""The exact ladder on this machine, with the toy model and random weights: `python -m benchmarks.streaming`."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from torch import nn

from rfbench import ladder, provenance
from rfbench.backbones.base import open_backbone
from rfbench.config import CacheCfg, SamplerCfg

STUDENT = SamplerCfg(
    steps=(1000, 750, 500, 250), shift=5.0, cache=CacheCfg("ema_sink", window=9, sink=3, alpha=0.9, fold_dtype="float32", rope="relative")
)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time every rung of the ladder in turns, in one process.")
    parser.add_argument("--chunks", type=int, default=14, help="length of the streams in chunks of 3 latent frames")
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processor time of a second thread that waits for the first would count as work
    backbone = open_backbone("toy")
    backbone.fresh(0)
    nn.init.normal_(backbone.denoiser.head.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    text = backbone.encode_text(["a red disc moves right"])
    found = ladder.climb(backbone, text, STUDENT, chunks=arguments.chunks, turns=arguments.turns)
    print("rung         ms/chunk  DiT FPS  ratio   chunk 0   chunk 3     whole")
    for rung in found:
        print(f"{rung.name:12} {rung.ms:8.2f} {rung.fps:8.0f} {rung.ratio:6.2f}  {rung.first:8.1e}  {rung.steady:8.1e}  {rung.whole:8.1e}")
    about = {"chunks": arguments.chunks, "turns": arguments.turns, "threads": torch.get_num_threads(), "machine": provenance.machine()}
    print(json.dumps({"rungs": [dataclasses.asdict(rung) for rung in found]} | about))


if __name__ == "__main__":
    main()
