"""The node pack as ComfyUI loads it: its nodes, their pages, and the workflows that use them."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.scene import KINDS, estimate, guided, made, noise, regions, text

from dense_attn import examples
from dense_attn.integrations import comfyui as integration

FOLDER = Path(examples.__file__).parent / "comfyui"
WORKFLOWS = sorted((FOLDER / "example_workflows").glob("*.json"))
SOCKETS = {"MODEL", "MASK", "CONDITIONING", "DENSE_ATTN_REGIONS", "DENSE_ATTN_EDITS"}


def loaded(folder: Path) -> ModuleType:
    """The pack from a copy of its folder, by its path."""
    name = "dense_attn_nodes"
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("", ".schema", ".regions", ".guidance"):
        monkeypatch.setitem(sys.modules, f"dense_attn_nodes{part}", None)
        del sys.modules[f"dense_attn_nodes{part}"]
    return Path(shutil.copytree(FOLDER, tmp_path / "custom_nodes" / "dense_attn_nodes"))


@pytest.fixture
def nodes(copied: Path, installed: None) -> dict[str, Any]:
    """The nodes by their ids, as the pack's entry point gives them."""
    pack = asyncio.run(loaded(copied).comfy_entrypoint())
    found = asyncio.run(pack.get_node_list())
    return {node.define_schema().node_id: node for node in found}


def test_without_comfyui_the_import_says_so(copied: Path) -> None:
    with pytest.raises(ImportError, match="the node pack must be loaded by a ComfyUI with"):
        loaded(copied)


def test_schemas_are_whole(nodes: dict[str, Any]) -> None:
    """Every input is an argument of `execute`, every widget has a default inside of its range."""
    assert len(nodes) == 5
    for name, node in nodes.items():
        schema = node.define_schema()
        ids = [one.id for one in schema.inputs]
        assert ids == list(inspect.signature(node.execute).parameters), name
        assert schema.description
        assert schema.category == "dense_attn"
        for one in schema.inputs:
            if one.kind == "COMBO":
                assert one.options
            elif one.kind not in SOCKETS:
                assert one.default is not None
                assert one.kind == "BOOLEAN" or one.min <= one.default <= one.max
        page = (FOLDER / "web/docs" / f"{name}.md").read_text("utf-8")
        named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", page, re.M))))
        assert named <= set(ids), name
        assert set(ids) - named <= {"model", "regions", "edits"}, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_nodes_as_they_are(path: Path, nodes: dict[str, Any]) -> None:
    graph = json.loads(path.read_text("utf-8"))
    by_id = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, place, kind in graph["links"]:
        output, given = by_id[source]["outputs"][slot], by_id[target]["inputs"][place]
        assert output["type"] == given["type"] == kind
        assert number in output["links"]
        assert given["link"] == number
    ours = [node for node in graph["nodes"] if node["type"] in nodes]
    assert len(ours) == 3
    for node in ours:
        schema = nodes[node["type"]].define_schema()
        sockets = [(one.id, one.kind) for one in schema.inputs if one.kind in SOCKETS]
        assert [(one["name"], one["type"]) for one in node["inputs"]] == sockets
        assert [one["type"] for one in node["outputs"]] == [one.kind for one in schema.outputs]
        widgets = [one for one in schema.inputs if one.kind not in SOCKETS]
        assert len(widgets) == len(node["widgets_values"])
        for widget, value in zip(widgets, node["widgets_values"]):
            assert (
                value in widget.options
                if widget.options
                else widget.min is None or (widget.min <= value <= widget.max)
            )


@pytest.mark.parametrize("kind", KINDS[:3])
def test_nodes_do_what_the_integration_does(kind: str, nodes: dict[str, Any]) -> None:
    x, chain = noise(kind), None
    for one in regions():
        given = {} if chain is None else {"regions": chain}
        region = {"mask": one.mask, "conditioning": one.conditioning}
        chain = nodes["DenseAttnRegion"].run(**region, **given)
    layout = nodes["DenseAttnApplyLayout"].run(model=made(kind), regions=chain, modulation="auto")
    expected = estimate(integration.apply_layout(made(kind), regions()), x)
    assert torch.equal(estimate(layout, x), expected)
    how = {"base_ratio": 0.3, "end_percent": 0.9}
    prompts = nodes["DenseAttnApplyRegionPrompts"].run(model=made(kind), regions=chain, **how)
    ratio = {"base_ratio": 0.3, "end": 0.9}
    expected = estimate(integration.apply_region_prompts(made(kind), regions(), **ratio), x)
    assert torch.equal(estimate(prompts, x), expected)


def test_nodes_of_concepts_do_what_the_integration_does(nodes: dict[str, Any]) -> None:
    first, second = text(6, 5), text(7, 3)
    edit = nodes["DenseAttnSemanticEdit"]
    chain = edit.run(conditioning=first, warmup=0)
    chain = edit.run(conditioning=second, reverse=True, warmup=1, cooldown=3, edits=chain)
    model = nodes["DenseAttnSemanticGuidance"].run(model=made("Flux"), edits=chain)
    edits = [
        integration.Edit(first, warmup=0),
        integration.Edit(second, reverse=True, warmup=1, cooldown=3),
    ]
    own = integration.semantic_guidance(made("Flux"), edits)
    sigmas, x = torch.tensor([1.0, 0.5, 0.0]).double(), noise("Flux")
    for step in range(2):
        assert torch.equal(guided(model, x, sigmas, step), guided(own, x, sigmas, step))


def test_the_pack_has_what_the_registry_asks_for() -> None:
    text = (FOLDER / "pyproject.toml").read_text("utf-8")
    (name,) = re.findall(r'^name = "(.*)"', text, re.M)
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", name)
    assert "comfyui" not in name.lower()
    assert re.search(r'^version = "\d+\.\d+\.\d+"', text, re.M)
    assert "[tool.comfy]" in text
