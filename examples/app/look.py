"""How the page looks: no font and no picture of it comes from elsewhere."""

from __future__ import annotations

import gradio as gr

from .canvas import COLOURS

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
CSS = """
.gradio-container { max-width: 1400px !important; }
.pixels img { image-rendering: pixelated; }
.pixels .grid-wrap, #grid .image-container { padding-top: 2.4rem; }
.example { font-weight: 400 !important; font-size: 0.85rem !important; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em; }
.scores { width: 100%; border-collapse: collapse; }
.scores th, .scores td { padding: 0.2rem 0.5rem; text-align: left; font-weight: 400; }
.scores thead th { font-weight: 600; }
.small { font-size: 0.85em; margin-top: 0.4rem; }
.note { border-left: 3px solid #9a6700; padding-left: 0.5rem; }
.refused { color: #b42318; font-weight: 600; }
.dark .refused { color: #ff9b8f; }
"""
CSS += "".join(
    f"#colour-{label} {{ border-left: 0.8rem solid {code} !important }}\n"
    for label, code in enumerate(COLOURS.values(), 1)
)
