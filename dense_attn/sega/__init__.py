"""Semantic guidance: exact percentile masks, one guided step, and the loop that keeps momentum."""

from dense_attn.sega.op import sega_guidance
from dense_attn.sega.percentile import percentile_mask
from dense_attn.sega.semantic_guidance import SemanticGuidance

__all__ = ["SemanticGuidance", "percentile_mask", "sega_guidance"]
