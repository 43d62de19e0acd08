"""`PrecisionFallback`, and its evidence: the failing step, run again in float32."""

from lit_stability.callbacks.precision_fallback.callback import PrecisionFallback

__all__ = ["PrecisionFallback"]
