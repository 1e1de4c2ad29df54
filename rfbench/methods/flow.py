"""Flow matching: the bidirectional teacher learns noise - x0 from clips and their captions.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

from torch import Tensor, nn

from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.dit import WanDiT
from rfbench.config import Recipe
from rfbench.data import ClipStore
from rfbench.methods.base import Batch, Draws
from rfbench.phases import phase
from rfbench.schedule import add_noise, shifted


class FlowMatching:
    """Trains denoiser and text encoder together; a share of captions is dropped for classifier-free guidance."""

    def __init__(self, recipe: Recipe, backbone: Backbone, store: ClipStore) -> None:
        assert isinstance(backbone, nn.Module) and recipe.data.drop_caption is not None
        self.recipe, self.backbone, self.store = recipe, backbone, store
        self.drop = recipe.data.drop_caption
        self.modules: dict[str, nn.Module] = {"generator": backbone}
        self.frozen: dict[str, WanDiT] = {}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        draws = Draws(self.backbone.shape, batch.seeds)
        x0, captions = self.store.pick(draws)
        dropped = (draws.uniform() < self.drop).tolist()
        text = self.backbone.encode_text(["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)])
        draws.like, x0 = text, x0.to(text)
        sigma_B1 = shifted(draws.uniform(), self.recipe.sampler.shift)[:, None]
        noise = draws(x0.shape[1])
        phase("forward")
        flow = self.backbone.denoiser(add_noise(x0, noise, sigma_B1), 1000 * sigma_B1, text)
        error_B = (flow - (noise - x0)).square().flatten(1).mean(1)
        return {"generator": error_B.mean()}, {"loss": error_B.detach()}
