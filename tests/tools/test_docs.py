"""README.md and docs/: their code runs, their links lead somewhere, and README stays a door."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)")
WITH_CODE = {
    "README",
    "diffusers",
    "does_it_work",
    "layout_attention",
    "reversible",
    "semantic_guidance",
}


def name_of(page: Path) -> str:
    return page.parent.name if page.parent.parent.name == "examples" else page.stem


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that a page names are pipelines of random weights, on the CPU and in float32."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dense_attn.examples._tiny_pipeline import tiny_pipeline

    monkeypatch.setattr(
        diffusers.DiffusionPipeline,
        "from_pretrained",
        classmethod(lambda kind, name, **_: tiny_pipeline(kind)),
    )
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *_, **__: pipe)


@pytest.mark.usefixtures("small_models", "one_thread")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if CODE.search(page.read_text("utf-8"))], ids=name_of
)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in CODE.findall(page.read_text("utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_pages_with_code_are_found() -> None:
    found = {name_of(page) for page in PAGES if CODE.search(page.read_text("utf-8"))}
    assert found >= WITH_CODE


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_a_door() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_every_public_name_has_its_place_in_the_api() -> None:
    """And what stands there is there."""
    listed = re.findall(
        r"^::: (dense_attn\S*)\.(\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE
    )
    for module, name in listed:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for package in ("dense_attn", "dense_attn.integrations.diffusers"):
        if package != "dense_attn":
            pytest.importorskip("diffusers")
        assert set(importlib.import_module(package).__all__) <= {name for _, name in listed}
