"""How the page looks: no font and no picture of it comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from .canvas import COLOURS, GRID, PAINTED

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
    body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600"
)
CSS = """
.gradio-container { max-width: 1400px !important; overflow: clip !important; }
#sides { align-items: stretch; }
.pixels img { image-rendering: pixelated; }
.pixels .grid-wrap, #grid .image-container { padding-top: 2.4rem; }
.example { font-weight: 400 !important; font-size: 0.85rem !important; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em; }
.scores { width: 100%; border-collapse: collapse; }
.scores th, .scores td { padding: 0.2rem 0.5rem; text-align: left; font-weight: 400; }
.scores thead th { font-weight: 600; }
#press {
  position: sticky; top: 0; z-index: var(--layer-5); flex-grow: 0 !important;
  background: var(--body-background-fill);
}
@media (max-width: 760px) {
  #press { position: fixed; top: auto; bottom: 0; left: 0; right: 0; padding: 0.5rem 1rem 0; }
  .gradio-container { padding-bottom: 9rem !important; }
  .scores { font-size: 0.8rem; }
  .scores th, .scores td { padding: 0.2rem !important; }
}
.small { font-size: 0.85em; margin-top: 0.4rem; }
.note { border-left: 3px solid #9a6700; padding-left: 0.5rem; }
#canvas canvas {
  width: min(100%, 512px); aspect-ratio: 1; image-rendering: pixelated; touch-action: none;
  display: block; margin: 0.5rem auto; border: 1px solid #767676; cursor: crosshair;
}
.tools { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; }
.tools button { padding: 0.3rem 0.6rem; border: 2px solid #bbbbbb; border-radius: 0.4rem; }
.tools [aria-pressed="true"] { border-color: currentColor; font-weight: 600; }
.tools input { vertical-align: middle; }
.refused { color: #b42318; font-weight: 600; }
.dark .refused { color: #ff9b8f; }
"""
SCRIPT = (Path(__file__).parent / "canvas.js").read_text("utf-8")
# The words of a colour are asked for once it is chosen or painted.
CSS += "".join(
    f"#colour-{label} {{ border-left: 0.8rem solid {code} !important }}\n"
    f"body[data-shown]:not([data-shown~='{label}']) #colour-{label}:has(:placeholder-shown) "
    "{ display: none !important }\n"
    for label, code in enumerate(COLOURS.values(), 1)
)


def canvas() -> str:
    """The canvas and its tools."""
    brushes = "".join(
        f"<button type='button' data-label='{label}'>"
        f"<span class='swatch' style='background:{code}'></span>{label} {name}</button>"
        for label, (name, code) in enumerate(PAINTED.items(), 1)
    )
    tools = "".join(
        f"<button type='button' data-tool='{tool}'>{tool}</button>" for tool in ("brush", "box")
    )
    keys = (
        "Canvas. Arrow keys move, space paints, digits choose a colour, 0 the eraser, "
        "control and z undo."
    )
    return (
        f"<div class='tools' role='group' aria-label='Colours'>{brushes}"
        "<button type='button' data-label='0'>eraser</button></div>"
        f"<canvas width='{GRID}' height='{GRID}' tabindex='0' role='application' "
        f"aria-label='{keys}'></canvas><div class='tools'>{tools}<label>width "
        "<input type='range' min='1' max='24' value='8'></label>"
        "<button type='button' data-undo>undo</button>"
        "<button type='button' data-clear>clear</button>"
        "<span class='small' aria-live='polite'></span></div>"
    )
