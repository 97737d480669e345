"""A node pack for ComfyUI: this folder, copied or linked into its custom_nodes."""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError as error:
    text = f"the node pack must be loaded by a ComfyUI with comfy_api.latest, got {error}"
    raise ImportError(text) from error

from .guidance import SemanticEdit, SemanticGuidance
from .regions import ApplyLayout, ApplyRegionPrompts, Region

WEB_DIRECTORY = "./web"  # whose docs/ has a page a node
NODES = [Region, ApplyLayout, ApplyRegionPrompts, SemanticEdit, SemanticGuidance]


class DenseAttn(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the classes of all nodes."""
        return NODES


async def comfy_entrypoint() -> DenseAttn:
    """Return the pack, which ComfyUI asks for."""
    return DenseAttn()
