"""A progress bar where tqdm is installed; one line where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def bar(
    total: int, description: str, *, shown: bool, unit: str = "step"
) -> Iterator[Callable[..., None]]:
    """`advance()`, to be called once a step, with numbers to show: `advance(loss=0.3)`."""
    if not shown:
        yield lambda **_: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{description}: {total} {unit}s (a bar needs tqdm)", file=sys.stderr)
        yield lambda **_: None
        return
    with tqdm(total=total, desc=description, unit=unit) as shown_bar:

        def advance(**numbers: float) -> None:
            if numbers:
                shown_bar.set_postfix(numbers, refresh=False)
            shown_bar.update()

        yield advance


def track(items: Iterable[T], description: str, unit: str = "batch") -> Iterator[T]:
    """The items behind a bar."""
    listed = list(items)
    with bar(len(listed), description, shown=True, unit=unit) as advance:
        for item in listed:
            yield item
            advance()
