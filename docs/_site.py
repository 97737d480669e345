"""The site's first page, README.md, and the pictures that the benchmarks draw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """The files of docs/, with README.md as the first page and the pictures beside it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for picture in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, RESULTS + picture.name, abs_src_path=str(picture)))
    for card in sorted(ROOT.glob("examples/*/README.md")):
        text = card.read_text(encoding="utf-8")
        files.append(File.generated(config, f"{card.parent.name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text with its links to those files as they lie in the site."""
    markdown = re.sub(rf"\]\((\.\./)*\.\./{RESULTS}", rf"](\1{RESULTS}", markdown)
    return re.sub(r"\]\((\.\./)*\.\./examples/(\w+)/README\.md", r"](\1\2.md", markdown)
