"""Models of ComfyUI's stand-in, and what is put on them."""

from __future__ import annotations

from comfyui import installed

__all__ = ["installed"]
