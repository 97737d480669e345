"""Nodes of semantic guidance: a list of concepts, and a model that they are put on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from dense_attn.integrations import comfyui

from .schema import Edits, node, number, patch


class SemanticEdit(io.ComfyNode):
    """A concept, behind others."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        steps = {"min": 0, "max": 10000}
        inputs = [
            io.Conditioning.Input("conditioning"),
            number("scale", 5.0, 100.0, step=0.1),
            number("threshold", 0.9, step=0.01),
            io.Int.Input("warmup", default=10, tooltip="The step that it begins at.", **steps),
            io.Int.Input("cooldown", default=0, tooltip="Its end; 0: none.", **steps),
            number("weight", 1.0, 10.0),
            io.Boolean.Input("reverse", default=False, tooltip="Away from the concept."),
            Edits.Input("edits", optional=True, tooltip="The concepts before this one."),
        ]
        says = "A concept that the image gets more of, or less; chain one for each."
        return node("SemanticEdit", "Semantic Edit", says, inputs, Edits.Output("edits"))

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        scale: float,
        threshold: float,
        warmup: int,
        cooldown: int,
        weight: float,
        reverse: bool,
        edits: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Return the concepts with one more."""
        steps = warmup, cooldown or None
        edit = comfyui.Edit(conditioning, scale, threshold, *steps, weight, reverse)
        return io.NodeOutput([*(edits or []), edit])


class SemanticGuidance(io.ComfyNode):
    """A model that is guided by concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return patch(
            "SemanticGuidance",
            "Semantic Guidance (SEGA)",
            "Pushes the guided estimate towards or away from concepts.",
            Edits.Input("edits"),
            number("momentum_scale", 0.1),
            number("momentum_beta", 0.4),
        )

    @classmethod
    def execute(
        cls, model: Any, edits: list[Any], momentum_scale: float, momentum_beta: float
    ) -> io.NodeOutput:
        """Return the model with the concepts."""
        momentum = {"momentum_scale": momentum_scale, "momentum_beta": momentum_beta}
        return io.NodeOutput(comfyui.semantic_guidance(model, edits, **momentum))
