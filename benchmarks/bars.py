"""What the library promises about speed and memory, and whether the rows of a run keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """The fastest of some contenders takes at least `bound` times the library's time.

    Without contenders: the library needs at most `bound` bytes beyond inputs and output.
    """

    workload: str
    passes: str
    dtype: str
    contenders: tuple[str, ...]
    bound: float

    def measured(self, rows: list[dict[str, Any]]) -> float | None:
        """The number that is compared with the bound, None when the run does not have it."""
        mine = [row for row in rows if (row["workload"], row["pass"], row["dtype"]) == self._setting]
        wanted, field = (self.contenders, "ratio") if self.contenders else (("dense_attn",), "peak_extra_bytes")
        values = [row.get(field) for row in mine if row["contender"] in wanted]
        values = [value for value in values if value is not None]
        return min(values) if len(values) == len(wanted) else None

    def verdict(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The bar as a row of the results."""
        value = self.measured(rows)
        kept = None if value is None else value >= self.bound if self.contenders else value <= self.bound
        return {
            "workload": self.workload, "pass": self.passes, "dtype": self.dtype,
            "what": " or ".join(self.contenders) + " / dense_attn" if self.contenders else "peak extra bytes",
            "bound": self.bound, "measured": value,
            "verdict": {None: "not measured", True: "pass", False: "miss"}[kept],
        }  # fmt: skip

    @property
    def _setting(self) -> tuple[str, str, str]:
        return self.workload, self.passes, self.dtype


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
)
