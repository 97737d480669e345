"""Nodes of regions: a list of them, and a model that they are put on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from dense_attn.integrations import comfyui

CATEGORY = "dense_attn"
Regions = io.Custom("DENSE_ATTN_REGIONS")


def percents(end: float) -> list[Any]:
    """The part of the schedule in which a model is changed."""
    how = {"min": 0.0, "max": 1.0, "step": 0.01}
    return [
        io.Float.Input("start_percent", default=0.0, **how),
        io.Float.Input("end_percent", default=end, **how),
    ]


class Region(io.ComfyNode):
    """A mask and a conditioning, behind other regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="DenseAttnRegion",
            display_name="Region",
            category=CATEGORY,
            description="What a part of the image shows; chain one for each part.",
            inputs=[
                io.Mask.Input("mask", tooltip="One for all images of the batch, or one for each."),
                io.Conditioning.Input("conditioning", tooltip="By the text encoder of the prompt."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="Region prompts: its share where regions overlap.",
                ),
                Regions.Input("regions", optional=True, tooltip="The regions before this one."),
            ],
            outputs=[Regions.Output("regions")],
        )

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
        strength = {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}
        return io.Schema(
            node_id="DenseAttnApplyLayout",
            display_name="Apply Layout (DenseDiffusion)",
            category=CATEGORY,
            description="Pulls each region of the image toward its conditioning.",
            inputs=[
                io.Model.Input("model"),
                Regions.Input("regions"),
                io.Combo.Input("modulation", options=["auto", "range", "max", "bias"]),
                io.Float.Input("strength", tooltip="Times the model's own.", **strength),
                io.Float.Input("self_strength", tooltip="From image to image.", **strength),
                io.Float.Input("size_weight", default=1.0, min=0.0, max=1.0, step=0.05),
                *percents(0.0),
            ],
            outputs=[io.Model.Output("model")],
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
        return io.Schema(
            node_id="DenseAttnApplyRegionPrompts",
            display_name="Apply Region Prompts",
            category=CATEGORY,
            description="Each region sees its own conditioning, and the prompt where none is.",
            inputs=[
                io.Model.Input("model"),
                Regions.Input("regions"),
                io.Float.Input(
                    "base_ratio",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The prompt's share in every region.",
                ),
                *percents(1.0),
            ],
            outputs=[io.Model.Output("model")],
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
