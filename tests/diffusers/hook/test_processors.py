"""Every attention processor of diffusers passes a point that the hook wraps, or is known."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Iterator

import torch
from diffusers.models import attention_dispatch
from pipelines import diffusers

from dense_attn.integrations.diffusers import _attention_hook as hook

# processors of diffusers' whose softmax is not seen and has no stand-in
UNSEEN = {
    "the softmax of get_attention_scores, with weights or text of its own": """
        CustomDiffusionAttnProcessor AttnAddedKVProcessor SlicedAttnAddedKVProcessor
        IPAdapterAttnProcessor AttendExciteAttnProcessor CrossAttnStoreProcessor
        Pix2PixZeroAttnProcessor CrossFrameAttnProcessor LEDITSCrossAttnProcessor
    """,
    "xformers' own, with weights or text of its own": """
        XFormersAttnAddedKVProcessor CustomDiffusionXFormersAttnProcessor
        IPAdapterXFormersAttnProcessor
    """,
    "linear attention, which has no softmax": """
        SanaMultiscaleAttnProcessor2_0 SanaLinearAttnProcessor2_0 SanaLinearAttnProcessor3_0
        PAGCFGSanaLinearAttnProcessor2_0 PAGIdentitySanaLinearAttnProcessor2_0
    """,
    "a kernel of neighbourhoods in a decoder": "LTX2VideoVaeNeighborhoodNattenProcessor",
}


def classes() -> Iterator[type]:
    """Every class of attention processors in this diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in (diffusers.models, diffusers.pipelines, diffusers.modular_pipelines):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                try:
                    importlib.import_module(module.name)
                except (ImportError, RuntimeError):  # utilities of packages that are not there
                    continue
    for name, module in list(sys.modules.items()):
        for kind in list(vars(module).values()) if name.startswith("diffusers.") else ():
            own = inspect.isclass(kind) and kind.__module__ == name and "__call__" in vars(kind)
            if not own or "Processor" not in kind.__name__:
                continue
            if list(inspect.signature(kind.__call__).parameters)[1:2] == ["attn"]:
                yield kind


def test_every_processor_is_seen_or_known() -> None:
    """A class that comes with a new diffusers passes one of the two points, or has its reason."""
    found = {kind.__name__: kind for kind in classes()}
    assert len(found) > 100
    unseen = {name for name, kind in found.items() if not hook.reaches(kind)}
    known = {name for names in UNSEEN.values() for name in names.split()}
    assert unseen - known - set(hook.STAND_INS) == set()
    assert (known | set(hook.STAND_INS)) & set(found) == unseen
    for name in hook.STAND_INS:
        assert hook.reaches(hook.stand_in(found[name]))


def test_processors_pass_the_points_of_their_modules() -> None:
    """Processors call the functions that the hook wraps: of torch's `F`, or diffusers' dispatch."""
    for kind in classes():
        if not hook.reaches(kind):
            continue
        run = inspect.unwrap(kind.__call__)
        if "scaled_dot_product_attention" in run.__code__.co_names:
            assert run.__globals__["F"] is torch.nn.functional, kind
        if "dispatch_attention_fn" in run.__code__.co_names:
            dispatch = run.__globals__["dispatch_attention_fn"]
            assert dispatch is attention_dispatch.dispatch_attention_fn, kind
