"""What there is to know of a backbone before it is built, and so without torch: whether a run is done can be told by this alone.

Wan's autoencoders, text encoder and tokenizer are the same for all of a generation. A backbone that is not listed here, or not in this precision, is
built to be asked, which takes seconds; what is listed is what the built one says of itself, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from rfbench.config import Streamed, WeightsCfg

REPO, REVISION = "Wan-AI/Wan2.1-T2V-1.3B", "37ec512624d61f7aa208f7ea8140a131f93afc9a"
TEXT = WeightsCfg(  # the same bytes lie in Wan-AI/Wan2.2-TI2V-5B, and so does the tokenizer: nobody downloads them twice
    file="models_t5_umt5-xxl-enc-bf16.pth",
    repo=REPO,
    revision=REVISION,
    bytes=11361920418,
    sha256="7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
)
TOKENIZER = WeightsCfg(
    file="google/umt5-xxl/tokenizer.json",
    repo=REPO,
    revision=REVISION,
    sha256="6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
)
VAE = WeightsCfg(
    file="Wan2.1_VAE.pth",
    repo=REPO,
    revision=REVISION,
    bytes=507609880,
    sha256="38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
)
VAE22 = WeightsCfg(
    file="Wan2.2_VAE.pth",
    repo="Wan-AI/Wan2.2-TI2V-5B",
    revision="921dbaf3f1674a56f47e83fb80a34bac8a8f203e",
    bytes=2818839170,
    sha256="20eb789667fa5e60e7516bf509512f6cb61f01b0aa0695eadaea930c13892b36",
)
TINY = WeightsCfg(file="taew2_1.pth")  # github.com/madebyollin/taehv; no hub repository of its authors, no published hash

WAN21 = {"text": TEXT, "tokenizer": TOKENIZER, "vae": VAE, "tiny": TINY}
WAN22 = {"text": TEXT, "tokenizer": TOKENIZER, "vae": VAE22}


@dataclass(frozen=True)
class Known:
    """A backbone's pixel frames per second, the settings that it has, and the files that belong to it and not to a checkpoint of it."""

    fps: int
    settings: tuple[str, ...]
    files: Mapping[str, WeightsCfg] = field(default_factory=dict)
    precisions: tuple[str, ...] = get_args(Streamed)

    def parts(self, decoder: str | None) -> dict[str, WeightsCfg]:
        """The files by what they are for; those of the small decoder only if it decodes."""
        return {role: file for role, file in self.files.items() if role != "tiny" or decoder == "tiny"}


KNOWN = {
    "toy": Known(16, ("precision", "attention", "decoder"), precisions=("float32", "float8")),
    "wan2.1-1.3b": Known(16, ("precision", "attention", "decoder", "reduced"), WAN21),
    "wan2.1-14b": Known(16, ("precision", "attention", "decoder", "reduced"), WAN21),
    "skyreels-v2-df-1.3b": Known(24, ("precision", "attention", "decoder", "reduced"), WAN21),
    "wan2.2-5b": Known(24, ("precision", "attention", "reduced"), WAN22),
}
