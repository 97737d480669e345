"""Nodes of regions: a list of them, and a model that they are put on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from dense_attn.integrations import comfyui

from .schema import Regions, node, number, patch, percents

OVERLAPPING = "Region prompts: its share where regions overlap."


class Region(io.ComfyNode):
    """A mask and a conditioning, behind other regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        inputs = [
            io.Mask.Input("mask", tooltip="One for all images of the batch, or one for each."),
            io.Conditioning.Input("conditioning", tooltip="By the text encoder of the prompt."),
            number("weight", 1.0, 100.0, least=0.01, step=0.01, tooltip=OVERLAPPING),
            Regions.Input("regions", optional=True, tooltip="The regions before this one."),
        ]
        says = "What a part of the image shows; chain one for each part."
        return node("Region", "Region", says, inputs, Regions.Output("regions"))

    @classmethod
    def execute(
        cls, mask: Any, conditioning: Any, weight: float, regions: list[Any] | None = None
    ) -> io.NodeOutput:
        """Return the regions with one more."""
        region = comfyui.Region(mask, conditioning, weight)
        return io.NodeOutput([*(regions or []), region])


class ApplyLayout(io.ComfyNode):
    """A model that pulls regions toward their conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return patch(
            "ApplyLayout",
            "Apply Layout (DenseDiffusion)",
            "Pulls each region of the image toward its conditioning.",
            Regions.Input("regions"),
            io.Combo.Input("modulation", options=["auto", "range", "max", "bias"]),
            number("strength", 1.0, 10.0, tooltip="Times the model's own."),
            number("self_strength", 1.0, 10.0, tooltip="From image to image."),
            number("size_weight", 1.0),
            *percents(0.0),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        regions: list[Any],
        modulation: str,
        strength: float,
        self_strength: float,
        size_weight: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        """Return the model with the layout; an end of 0 is the model's own."""
        patched = comfyui.apply_layout(
            model,
            regions,
            modulation=modulation,
            strength=strength,
            self_strength=self_strength,
            size_weight=size_weight,
            start=start_percent,
            end=end_percent or None,
        )
        return io.NodeOutput(patched)


class ApplyRegionPrompts(io.ComfyNode):
    """A model whose regions see their own conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return patch(
            "ApplyRegionPrompts",
            "Apply Region Prompts",
            "Each region sees its own conditioning, and the prompt where none is.",
            Regions.Input("regions"),
            number("base_ratio", 0.0, tooltip="The prompt's share in every region."),
            *percents(1.0),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        regions: list[Any],
        base_ratio: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        """Return the model with the regions."""
        window = {"start": start_percent, "end": end_percent}
        return io.NodeOutput(
            comfyui.apply_region_prompts(model, regions, base_ratio=base_ratio, **window)
        )
