"""rfbench: train, run, score and time streaming video generators under one protocol."""

__version__ = "0.1.0"
