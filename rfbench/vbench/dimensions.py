"""VBench's dimensions as data: how each is normalised, what it weighs, and to which half of the total it belongs.

Source: Vchitect/VBench@45e79ec scripts/constant.py; the leaderboard's totals follow from it to their last printed digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Dimension:
    """Its share of a group is weight * (value - low) / (high - low), for fractions; nothing is clamped."""

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    least: float = 0.0  # fraction below which no clip can be: -1 for a cosine, and for the linear head of aesthetic quality


@dataclass(frozen=True)
class Board:
    """A leaderboard: its dimensions, and the groups whose weighted mean is its total."""

    title: str
    dimensions: Mapping[str, Dimension]
    groups: Mapping[str, float]


T2V = Board(
    "VBench",
    {
        "subject_consistency": Dimension("quality", 0.1462),
        "background_consistency": Dimension("quality", 0.2615),
        "temporal_flickering": Dimension("quality", 0.6293),
        "motion_smoothness": Dimension("quality", 0.706, 0.9975),
        "dynamic_degree": Dimension("quality", weight=0.5),
        "aesthetic_quality": Dimension("quality", least=-1.0),
        "imaging_quality": Dimension("quality"),
        "object_class": Dimension("semantic"),
        "multiple_objects": Dimension("semantic"),
        "human_action": Dimension("semantic"),
        "color": Dimension("semantic"),
        "spatial_relationship": Dimension("semantic"),
        "scene": Dimension("semantic", high=0.8222),
        "appearance_style": Dimension("semantic", 0.0009, 0.2855, least=-1.0),
        "temporal_style": Dimension("semantic", high=0.364, least=-1.0),
        "overall_consistency": Dimension("semantic", high=0.364, least=-1.0),
    },
    {"quality": 4.0, "semantic": 1.0},
)

I2V = Board(
    "VBench-I2V",
    {
        "camera_motion": Dimension("i2v", weight=0.1),
        "i2v_subject": Dimension("i2v", 0.1462),
        "i2v_background": Dimension("i2v", 0.2615),
        **{
            name: T2V.dimensions[name]
            for name in (
                "subject_consistency",
                "background_consistency",
                "motion_smoothness",
                "dynamic_degree",
                "aesthetic_quality",
                "imaging_quality",
            )
        },
    },
    {"i2v": 1.0, "quality": 1.0},
)
