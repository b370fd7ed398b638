"""Methods to compare: one file each, registered by name when this package is imported."""

import qvsr.quantvsr  # noqa: F401  (registers quantvsr)
from baselines import full_precision, maxmin, passionsr, q_diffusion, quarot, svdquant, vidit_q

__all__ = ["full_precision", "maxmin", "passionsr", "q_diffusion", "quarot", "svdquant", "vidit_q"]
