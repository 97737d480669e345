"""The error that the page shows beside a field."""

from __future__ import annotations

from typing import NoReturn

FIELDS = ("canvas", "words", "prompt", "numbers", "edits", "file", "run")


class Refused(ValueError):
    """An input that cannot be used: the field that it stands in, and one sentence."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field


def refuse(field: str, name: str, rule: str, got: object) -> NoReturn:
    """Raise Refused with the sentence `<name> must <rule>, got <got>`."""
    raise Refused(field, f"{name} must {rule}, got {got}")
