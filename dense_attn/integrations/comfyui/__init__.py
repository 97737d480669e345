"""Layouts, prompts of regions and semantic guidance on a model of ComfyUI."""

from .guidance import Edit, semantic_guidance
from .layouts import apply_layout, apply_region_prompts
from .regions import Region

__all__ = ["Edit", "Region", "apply_layout", "apply_region_prompts", "semantic_guidance"]
