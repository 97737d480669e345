"""The numbers of `apply_layout` for regions with phrases, and each family's own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dense_attn import _checks
from dense_attn.layout_attention.op import MODULATIONS

from . import blocks as _blocks

if TYPE_CHECKING:
    from ..models.record import Model

KINDS = ("text", "image")


class Defaults(NamedTuple):
    """The numbers of a layout whose caller does not say."""

    modulation: str
    blocks: tuple[str, ...]
    cross_weight: float
    self_weight: float | None  # None: as cross_weight
    active: float
    exponent: float


# DenseDiffusion's own, of its authors' code for Stable Diffusion
RANGE = Defaults("range", _blocks.BLOCKS, 1.0, 0.3, 0.3, 5.0)
# joint attention: the best on two small models, see docs/diffusers.md
JOINT = Defaults("bias", ("image->text",), 3.0, None, 0.5, 0.0)


@dataclass(frozen=True)
class Options:
    """The numbers of one block."""

    cross_weight: float
    self_weight: float
    active: float
    active_sigma: float | None
    exponent: float
    size_weight: float
    modulation: str
    blocks: tuple[str, ...]
    backend: str

    def weight(self, rows: str, columns: tuple[str, ...] = KINDS) -> float:
        """The strength of rows of a kind of tokens in a layer of these kinds of keys."""
        name = _weight_of(self.blocks, rows, columns)
        return 0.0 if name is None else getattr(self, name)

    @property
    def acts(self) -> bool:
        """Whether any pair has a strength."""
        return any(self.weight(row, (column,)) for row in KINDS for column in KINDS)


def options_of(model: Model, given: dict[str, Any], backend: str) -> Options:
    """The numbers of a call; those that are None are the family's, or of the modulation given."""
    own = model.defaults
    modulation = own.modulation
    if given["modulation"] is not None:
        modulation = _checks.choice("modulation", given["modulation"], MODULATIONS)
    if modulation != own.modulation:
        own = RANGE
    blocks = own.blocks
    if given["blocks"] is not None:
        blocks = _blocks.parse(given["blocks"])
        _check_blocks(model, modulation, blocks)
    numbers = _weights(model, own, blocks, given)
    active = given["active"]
    return Options(
        **numbers,
        active=own.active if active is None else _checks.fraction("active", active),
        active_sigma=sigma_of(given),
        exponent=own.exponent if given["exponent"] is None else _exponent(given["exponent"]),
        size_weight=_checks.number("size_weight", given["size_weight"], torch.float32),
        modulation=modulation,
        blocks=blocks,
        backend=backend,
    )


def sigma_of(given: dict[str, Any]) -> float | None:
    """The noise at which a layout's steps end, where a call says it in the place of a part."""
    sigma = given["active_sigma"]
    if sigma is None:
        return None
    if given["active"] is not None:
        _checks.refuse("active", "be None beside active_sigma", given["active"])
    return _checks.fraction("active_sigma", sigma)


def _weights(
    model: Model, own: Defaults, blocks: tuple[str, ...], given: dict[str, Any]
) -> dict[str, float]:
    """The strengths of a call, or a refusal of one that is given and that no row has."""
    names = "cross_weight", "self_weight"
    told = {
        name: _checks.number(name, given[name], torch.float32)
        for name in names
        if given[name] is not None
    }
    numbers = {name: told.get(name, getattr(own, name)) for name in names}
    if numbers["self_weight"] is None:
        numbers["self_weight"] = numbers["cross_weight"]
    kinds = model.layer_kinds
    used = {_weight_of(blocks, row, columns) for rows, columns in kinds for row in rows} - {None}
    if model.joint and {"image->text", "image->image"} == set(blocks):  # whose rows have one
        if len(told) < 2:
            numbers = dict.fromkeys(names, numbers[next(iter(told), "self_weight")])
        elif told["cross_weight"] != told["self_weight"]:
            rule = f"be cross_weight where blocks={blocks!r}, for a row has one strength"
            _checks.refuse("self_weight", rule, f"{told['self_weight']} and {told['cross_weight']}")
        return numbers
    for name, value in told.items():
        if name not in used and value not in (0, *(numbers[other] for other in used)):
            rule = f"stay None or 0 where blocks={blocks!r}, of which none has it"
            _checks.refuse(name, rule, value)
    return numbers


def _weight_of(blocks: tuple[str, ...], row: str, columns: Collection[str]) -> str | None:
    """The name of the strength of a kind of rows in layers of these kinds of keys."""
    touched = {f"{row}->{kind}" for kind in columns} & set(blocks)
    if "image->image" in touched:
        return "self_weight"
    return "cross_weight" if touched else None


def _exponent(value: object) -> float:
    if _checks.number("exponent", value) < 0:
        _checks.refuse("exponent", "be at least 0", value)
    return float(value)


def _check_blocks(model: Model, modulation: str, blocks: tuple[str, ...]) -> None:
    """Refuse blocks that a model does not have, or that a row's one strength cannot honour."""
    kinds = model.layer_kinds
    pairs = {f"{row}->{kind}" for rows, columns in kinds for row in rows for kind in columns}
    if not pairs.issuperset(blocks):
        own = ", ".join(block for block in _blocks.BLOCKS if block in pairs)
        _checks.refuse("blocks", f"be of the {model.denoiser}'s own, {own}", blocks)
    touched = [sum(block.startswith(kind) for block in blocks) for kind in KINDS]
    if model.joint and modulation == "range" and 1 in touched:
        rule = 'have all or none of the pairs of a row under modulation "range", which changes them'
        _checks.refuse("blocks", f"{rule} all", blocks)
