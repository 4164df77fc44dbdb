"""Which visual tokens stay, and after which layer: methods are data, the surgery is model.trunk's."""

from .budget import average_tokens, kept_tokens, legal_range
from .methods import METHODS, plan_for
from .plan import Plan, Probe, Stage

__all__ = ["METHODS", "Plan", "Probe", "Stage", "average_tokens", "kept_tokens", "legal_range", "plan_for"]
