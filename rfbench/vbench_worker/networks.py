"""VBench's networks, built by its own constructors from its own weight files: which file, where it comes from, what is still missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rfbench.records import atomic, sha256_of

VBENCH_MODELS = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"
CLIP_MODELS = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True)
class Asset:
    """A file that a network needs. The first of `places` that exists is used; a missing one is fetched to the first."""

    places: tuple[str, ...]  # {cache} is VBench's folder, {hub} torch.hub's, {home} the user's
    url: str
    size: str = ""
    unpack: str | None = None  # what to do with the download, run in its folder

    def found(self) -> Path | None:
        return next((path for path in map(_place, self.places) if path.exists()), None)

    def command(self) -> str:
        """What fetches it."""
        path = _place(self.places[0])
        folder, target = shlex.quote(str(path.parent)), shlex.quote(str(path))
        if self.url.endswith(".git"):
            return f"git clone --depth 1 {self.url} {target}"
        if self.unpack:
            return f"mkdir -p {folder} && cd {folder} && curl -fL -o download.zip {self.url} && {self.unpack}"
        return f"mkdir -p {folder} && curl -fL -o {target} {self.url}"


DINO_CODE = Asset(
    ("{hub}/facebookresearch_dino_main", "{cache}/dino_model/facebookresearch_dino_main"), "https://github.com/facebookresearch/dino.git"
)
DINO = Asset(
    ("{hub}/checkpoints/dino_vitbase16_pretrain.pth",),
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "343 MB",
)
CLIP_B = Asset(
    ("{cache}/clip_model/ViT-B-32.pt", "{home}/.cache/clip/ViT-B-32.pt"),
    f"{CLIP_MODELS}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "354 MB",
)
CLIP_L = Asset(
    ("{cache}/clip_model/ViT-L-14.pt", "{home}/.cache/clip/ViT-L-14.pt"),
    f"{CLIP_MODELS}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "933 MB",
)
AESTHETIC = Asset(
    ("{cache}/aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",),
    "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
)
MUSIQ = Asset(
    ("{cache}/pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    "109 MB",
)
AMT = Asset(("{cache}/amt_model/amt-s.pth",), "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", "12 MB")
RAFT = Asset(
    ("{cache}/raft_model/models/raft-things.pth",),
    "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
    "82 MB",
    unpack="unzip -j download.zip models/raft-things.pth && rm download.zip",
)
UMT = Asset(("{cache}/umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",), f"{VBENCH_MODELS}/l16_ptk710_ftk710_ftk400_f16_res224.pth", "1.2 GB")
VICLIP = Asset(("{cache}/ViCLIP/ViClip-InternVid-10M-FLT.pth",), f"{VBENCH_MODELS}/ViClip-InternVid-10M-FLT.pth", "1.7 GB")
WORDS = Asset(
    ("{cache}/ViCLIP/bpe_simple_vocab_16e6.txt.gz",), "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
)
TAG2TEXT = Asset(
    ("{cache}/caption_model/tag2text_swin_14m.pth",),
    "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
    "4.5 GB",
)
GRIT = Asset(("{cache}/grit_model/grit_b_densecap_objectdet.pth",), f"{VBENCH_MODELS}/grit_b_densecap_objectdet.pth", "0.9 GB")
BERT = Asset(("{hf}/hub/models--bert-base-uncased",), "bert-base-uncased")  # only its tokenizer

NEEDS: dict[str, tuple[Asset, ...]] = {
    "subject_consistency": (DINO_CODE, DINO),
    "background_consistency": (CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": (AMT,),
    "dynamic_degree": (RAFT,),
    "aesthetic_quality": (CLIP_L, AESTHETIC),
    "imaging_quality": (MUSIQ,),
    "object_class": (GRIT, BERT),
    "multiple_objects": (GRIT, BERT),
    "human_action": (UMT,),
    "color": (GRIT, BERT),
    "spatial_relationship": (GRIT, BERT),
    "scene": (TAG2TEXT, BERT),
    "appearance_style": (CLIP_B,),
    "temporal_style": (VICLIP, WORDS),
    "overall_consistency": (VICLIP, WORDS),
    "static": (RAFT,),  # no dimension of its own: the filter in front of temporal_flickering
}


def cache_folder() -> Path:
    """Where VBench keeps its weights: VBENCH_CACHE_DIR, else ~/.cache/vbench."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def _place(template: str) -> Path:
    hf = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(template.format(cache=cache_folder(), hub=torch.hub.get_dir(), home=Path.home(), hf=hf))


def module(dimension: str) -> Any:
    """vbench's module of a dimension."""
    return importlib.import_module("vbench.cli.static_filter" if dimension == "static" else f"vbench.{dimension}")


def version(dimension: str, driver: str, seed: int | None) -> str:
    """What a score of a dimension depends on beside the clip: vbench, the driver and the weights; `seed` stands for drawn weights."""
    from rfbench.vbench_worker import REVISION

    if seed is not None:
        weights = f"random{seed}"
    else:
        digests = [sha256_of(path)[:12] for asset in NEEDS[dimension] if (path := asset.found()) is not None and path.is_file()]
        weights = "-".join(digests) or "no-weights"
    return f"{importlib.metadata.version('vbench')}/{driver}{REVISION}/{weights}"


def supply_words() -> None:
    """Put ViCLIP's vocabulary where vbench looks for it when it is imported: it is the file that openai-clip ships."""
    path, clip = _place(WORDS.places[0]), importlib.util.find_spec("clip")
    if not path.exists() and clip is not None and clip.origin is not None:
        with atomic(path) as temporary:
            shutil.copyfile(Path(clip.origin).parent / path.name, temporary)


def submodules(dimension: str) -> Any:
    """The arguments of vbench's constructor for a dimension, by its own init_submodules; the files are there, so that nothing is fetched."""
    from vbench.utils import init_submodules

    local = {"subject_consistency": DINO_CODE, "aesthetic_quality": CLIP_L}.get(dimension, CLIP_B).found()
    return init_submodules([dimension], local=local is not None and cache_folder() in local.parents)[dimension]


def dino(device: torch.device) -> Any:
    return torch.hub.load(**submodules("subject_consistency")).to(device)


def clip(device: torch.device, dimension: str) -> Any:
    import clip as openai_clip

    found = submodules(dimension)
    network, _ = openai_clip.load(found["name"] if isinstance(found, dict) else found[0], device=device)
    return network.eval()


def aesthetic_head(device: torch.device) -> Any:
    return module("aesthetic_quality").get_aesthetic_model(submodules("aesthetic_quality")[1]).to(device)


def musiq(device: torch.device) -> Any:
    network = module("imaging_quality").MUSIQ(pretrained_model_path=submodules("imaging_quality")["model_path"])
    return network.to(device).eval()


def amt(device: torch.device) -> Any:
    found = submodules("motion_smoothness")
    return module("motion_smoothness").MotionSmoothness(found["config"], found["ckpt"], device)


def raft(device: torch.device) -> Any:
    from easydict import EasyDict

    args = EasyDict(model=submodules("dynamic_degree")["model"], small=False, mixed_precision=False, alternate_corr=False)
    return module("dynamic_degree").DynamicDegree(args, device).model


def umt(device: torch.device) -> Any:
    """The action recogniser, with the arguments that vbench.human_action.human_action gives."""
    home = module("human_action")
    network = home.create_model(
        "vit_large_patch16_224",
        pretrained=False,
        num_classes=400,
        all_frames=16,
        tubelet_size=1,
        use_learnable_pos_emb=False,
        fc_drop_rate=0.0,
        drop_rate=0.0,
        drop_path_rate=0.2,
        attn_drop_rate=0.0,
        drop_block_rate=None,
        use_checkpoint=False,
        checkpoint_num=16,
        use_mean_pooling=True,
        init_scale=0.001,
    )
    network.load_state_dict(torch.load(submodules("human_action")[0], map_location="cpu"), strict=False)
    return network.to(device).eval()


def viclip(device: torch.device) -> Any:
    home = module("overall_consistency")
    tokenizer = home.SimpleTokenizer(str(_place(WORDS.places[0])))
    return home.ViCLIP(tokenizer=tokenizer, **submodules("overall_consistency")).to(device)


def tag2text(device: torch.device) -> Any:
    return module("scene").tag2text_caption(**submodules("scene")).eval().to(device)


def grit(device: torch.device, dimension: str) -> Any:
    model = module(dimension).DenseCaptioning(device)
    initialize = model.initialize_model if dimension == "color" else model.initialize_model_det
    initialize(**submodules(dimension))
    return model


@dataclass(frozen=True)
class Ready:
    """Whether a dimension can run here; if not, why and what to do."""

    dimension: str
    version: str | None
    problem: str = ""
    fix: str = ""


def check(dimensions: Sequence[str], driver: str, seed: int | None = None, *, versions: bool = True) -> list[Ready]:
    """Try the imports of each dimension and look for its files; `versions` reads the files to hash them."""
    return [_check(dimension, driver, seed, versions) for dimension in dimensions]


def _check(dimension: str, driver: str, seed: int | None, versions: bool) -> Ready:
    try:
        module(dimension)
    except ImportError as error:
        fix = "rfbench env vbench --with detectron2" if "detectron2" in str(error) else "rfbench env vbench --fresh"
        return Ready(dimension, None, f"it does not import ({error})", fix)
    if seed is None:
        missing = [asset for asset in NEEDS[dimension] if asset.found() is None]
        if missing:
            sizes = ", ".join(f"{_place(asset.places[0]).name}{f' ({asset.size})' if asset.size else ''}" for asset in missing)
            return Ready(dimension, None, f"not on this machine: {sizes}", " && ".join(map(fetch_command, missing)))
    return Ready(dimension, version(dimension, driver, seed) if versions else "")


def fetch_command(asset: Asset) -> str:
    """What fetches a file."""
    if asset is BERT:
        return "python -c \"from transformers import BertTokenizer; BertTokenizer.from_pretrained('bert-base-uncased')\""
    return asset.command()
