"""Prefill, draft, verify, commit: one loop for plain and speculative decoding, and one pass for likelihoods."""

from .loop import Decoder, Step
from .prefill import embed, read
from .score import Likelihood, score
from .streamer import DraftStreamer

__all__ = ["Decoder", "DraftStreamer", "Likelihood", "Step", "embed", "read", "score"]
