"""Prefill, draft, verify, roll back: one loop for plain and speculative decoding."""

from .loop import Decoder, Step
from .streamer import DraftStreamer

__all__ = ["Decoder", "DraftStreamer", "Step"]
