"""The promises of speed, memory and exactness, and whether a run's rows keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_AT_MOST = {  # what the verdict calls each field
    "peak_extra_bytes": "peak extra bytes",
    "differing_bits": "differing bits of a round trip",
    "share": "share of time outside the network",
    "share_idle": "time with an idle network / time",
    "graph_seconds": "seconds in a CUDA graph",
    "of_op": "host seconds / those of its raw ops",
    "of_sdpa": "host seconds / those of plain SDPA",
    "host_seconds": "host seconds before a launch",
}
_AT_LEAST = {
    "ratio": "{} / {way}",
    "of_copy": "dense_attn's bytes per second / {}'s",
    "of_large_copy": "bytes per second / those of a large copy",
}


@dataclass(frozen=True)
class Bar:
    """The fastest of some contenders takes at least `bound` times the library's time.

    Without contenders: the library needs at most `bound` bytes beyond inputs and output. `field`
    names another number of the rows: `of_copy` and `of_large_copy` are at least `bound`, the others
    are at most that. `way` is another of the library's own ways, whose row has its ratio to the
    first. A contender that cannot run, its row having a reason, is not among the fastest.
    """

    workload: str
    passes: str
    dtype: str
    contenders: tuple[str, ...]
    bound: float
    field: str = ""
    way: str = "dense_attn"

    def measured(self, rows: list[dict[str, Any]]) -> float | None:
        """The number that is compared with the bound, None when the run does not have it."""
        key = self.workload, self.passes, self.dtype
        mine = [row for row in rows if (row["workload"], row["pass"], row["dtype"]) == key]
        wanted = self.contenders or (self.way,)
        ran = [row for row in mine if "wrong" in row or "reason" not in row]
        able = {row["contender"]: _number(row, self._field) for row in ran}
        values = [able[name] for name in wanted if name in able]
        known = len([row for row in mine if row["contender"] in wanted]) == len(wanted)
        if not known or not values or None in values:
            return None
        if not self.contenders or self.way == "dense_attn":
            return min(values)
        own = able.get(self.way)
        return min(values) / own if own else None

    def verdict(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The bar as a row of the results."""
        value, at_most = self.measured(rows), self._field in _AT_MOST
        kept = None if value is None else value <= self.bound if at_most else value >= self.bound
        form = (_AT_MOST if at_most else _AT_LEAST)[self._field]
        what = form.format(" or ".join(self.contenders), way=self.way)
        return {
            "workload": self.workload,
            "pass": self.passes,
            "dtype": self.dtype,
            "what": what,
            "bound": self.bound,
            "measured": value,
            "verdict": {None: "not measured", True: "pass", False: "miss"}[kept],
        }

    @property
    def _field(self) -> str:
        return self.field or ("ratio" if self.contenders else "peak_extra_bytes")


def _number(row: dict[str, Any], field: str) -> float | None:
    """A number of a row; the time in a graph is that of a row that was timed so."""
    if field == "graph_seconds":
        return row.get("seconds") if row.get("timing") == "graph" else None
    return row.get("seconds" if field == "host_seconds" else field)


_STEPS = {
    "ddim-step": "float32",
    "ddim-step-cfg": "float32",
    "leapfrog": "float32",
    "edict-mix": "float32",
    "exact-mix": "int64",
}
_TRITON = dict.fromkeys(
    (
        *("fwd", "fwd-tiled", "bwd", "tile-lists", "percentile", "sega-guidance", "ddim-step"),
        *("leapfrog-step", "edict-mix", "edict-unmix", "exact-couple", "exact-leapfrog"),
        *("exact-mix", "exact-unmix"),
    ),
    "float32",
) | {"fwd-specialised": "float16"}
HOST_BARS = (  # of every machine
    Bar("host-attention", "fwd", "float32", (), 3, "of_op"),
    Bar("host-attention-record", "fwd", "float32", (), 5, "of_op"),
    Bar("host-attention-grad", "fwd+bwd", "float32", (), 5, "of_op"),
    Bar("host-percentile", "fwd", "float32", (), 3, "of_op"),
    Bar("host-ddim-step", "fwd", "float32", (), 3, "of_op"),
    Bar("host-sega-step", "fwd", "float32", (), 3, "of_op"),
    Bar("host-exact-step", "fwd", "float32", (), 3, "of_op"),
    Bar("host-layer", "fwd", "float32", (), 2, "of_sdpa"),
    *(
        Bar(f"triton-{op}", "fwd", dtype, (), 40e-6, "host_seconds", "dense_attn-op")
        for op, dtype in _TRITON.items()
    ),
)
BARS = (
    Bar("sd15-self-64", "fwd", "float32", ("sdpa",), 1.3),
    Bar("sdxl-self-64", "fwd", "float32", ("sdpa",), 1.3),
    Bar("sd15-self-64", "fwd", "bfloat16", ("sdpa",), 2.2),
    Bar("sdxl-self-64", "fwd", "bfloat16", ("sdpa",), 2.2),
    Bar("sd15-self-64", "fwd", "float32", ("eager",), 15),
    Bar("sd15-self-64", "fwd", "bfloat16", ("eager",), 25),
    Bar("sd15-self-64", "fwd", "float32", ("flex-smart", "flex-naive"), 4),
    Bar("sd15-cross-64", "fwd", "float32", ("sdpa",), 1.5),
    Bar("sd15-self-64", "fwd+bwd", "float32", ("sdpa",), 1.0),
    Bar("sd15-self-64", "fwd", "float32", (), 16e6),
    Bar("sd15-self-64", "fwd", "bfloat16", (), 16e6),
    Bar("percentile-4x4096", "fwd", "float32", ("torch.quantile",), 20),
    Bar("percentile-1x16m", "fwd", "float32", ("torch.quantile",), 5),
    *(
        Bar(name, "fwd", "float32", ("diffusers",), 10)
        for name in ("sega-3-64", "sega-3-128-16ch", "sega-3-packed", "sega-3-packed-tokens")
    ),
    *(
        Bar(f"{op}-{size}", "fwd", dtype, ("clone",), 0.8, "of_copy")
        for op, dtype in _STEPS.items()
        for size in ("1m", "16m", "256m")
    ),
    Bar("edict-50", "fwd", "float32", (), 0.02, "share"),
    Bar("edict-50", "fwd", "float32", (), 0.02, "share_idle"),
    *(
        Bar(f"round-trip-{name}-{steps}", "loop", "exact", (), 0, "differing_bits")
        for name in ("edict", "bdia")
        for steps in (10, 50, 200, 1000)
    ),
    *HOST_BARS,
)

_SDPA = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
_SELF = ("sd15-self-64", "sdxl-self-64", "flux-joint-1024")
_SORTED = "dense_attn-sorted"
GPU_BARS = (
    *(Bar(name, "fwd", "bfloat16", _SDPA, 0.67) for name in _SELF),
    *(Bar(name, "fwd", "bfloat16", _SDPA, 0.9, way=_SORTED) for name in _SELF),
    *(Bar(name, "bwd", "bfloat16", _SDPA, 0.85) for name in _SELF),
    *(Bar(name, "fwd", "bfloat16", ("flex-smart",), 1.5) for name in _SELF),
    *(Bar(name, "fwd", "bfloat16", ("eager",), 10) for name in _SELF),
    *(
        Bar(name, "fwd", "bfloat16", (), 0.8, "of_large_copy")
        for name in ("sd15-cross-64", "sdxl-cross-64")
    ),
    Bar("sega-3-64", "fwd", "float32", (), 15e-6, "graph_seconds"),
    *(Bar(f"{op}-256m", "fwd", dtype, ("copy",), 0.9, "of_copy") for op, dtype in _STEPS.items()),
    *(
        Bar(f"round-trip-{name}-across", "loop", "exact", (), 0, "differing_bits")
        for name in ("edict", "bdia")
    ),
    *HOST_BARS,
)
