"""The numbers of `apply_layout` for regions with phrases, and each family's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
# joint attention: the best of 18 settings on one small model, see docs/diffusers.md
JOINT = Defaults("bias", ("image->text",), 3.0, None, 0.5, 0.0)


@dataclass(frozen=True)
class Options:
    """The numbers of one block."""

    cross_weight: float
    self_weight: float
    active: float
    exponent: float
    size_weight: float
    modulation: str
    blocks: tuple[str, ...]
    backend: str

    def weight(self, rows: str, columns: tuple[str, ...] = KINDS) -> float:
        """The strength of rows of a kind of tokens in a layer of these kinds of keys."""
        touched = [f"{rows}->{kind}" for kind in columns if f"{rows}->{kind}" in self.blocks]
        if "image->image" in touched:
            return self.self_weight
        return self.cross_weight if touched else 0.0

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
    numbers = {name: _number(name, given[name]) for name in ("cross_weight", "self_weight")}
    for name, value in numbers.items():
        numbers[name] = getattr(own, name) if value is None else value
    if numbers["self_weight"] is None:
        numbers["self_weight"] = numbers["cross_weight"]
    blocks, active = given["blocks"], given["active"]
    options = Options(
        **numbers,
        active=own.active if active is None else _checks.fraction("active", active),
        exponent=own.exponent if given["exponent"] is None else _exponent(given["exponent"]),
        size_weight=_checks.number("size_weight", given["size_weight"]),
        modulation=modulation,
        blocks=own.blocks if blocks is None else _blocks.parse(blocks),
        backend=backend,
    )
    _check_blocks(model, options, blocks is not None)
    return options


def _number(argument: str, value: object) -> float | None:
    return None if value is None else _checks.number(argument, value)


def _exponent(value: object) -> float:
    if _checks.number("exponent", value) < 0:
        _checks.refuse("exponent", "be at least 0", value)
    return float(value)


def _check_blocks(model: Model, options: Options, named: bool) -> None:
    """Refuse blocks that a model does not have, or that a row's one strength cannot honour."""
    blocks = options.blocks
    rows = {kind: [block for block in blocks if block.startswith(kind)] for kind in KINDS}
    if not model.joint:
        if named and rows["text"]:
            rule = f"be of the image's rows on a {model.denoiser}, whose text attends to nothing"
            _checks.refuse("blocks", rule, blocks)
        return
    if options.modulation == "range" and any(len(touched) == 1 for touched in rows.values()):
        rule = 'have all or none of the pairs of a row under modulation "range", which changes them'
        _checks.refuse("blocks", f"{rule} all", blocks)
    if len(rows["image"]) == 2 and not rows["text"]:
        weights = options.cross_weight, options.self_weight
        if weights[0] != weights[1]:
            rule = f"be cross_weight where blocks={blocks!r}, for a row has one strength"
            _checks.refuse("self_weight", rule, f"{weights[1]} and {weights[0]}")
