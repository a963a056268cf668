"""What commands show on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def console():
    """A console for tables, wide enough for them where the output is not a terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


@contextmanager
def progress_bar(total: int | None, start: int = 0, show: bool = True) -> Iterator[Callable[[int, dict], None]]:
    """A bar with reward, accuracy and NFE on it; yields ``(done, metrics) -> None``."""
    from tqdm import tqdm

    with tqdm(total=total, initial=start, dynamic_ncols=True, mininterval=1.0, disable=not show) as bar:

        def update(done: int, metrics: dict) -> None:
            bar.set_postfix(
                {k: f"{metrics[k]:.3g}" for k in ("reward", "accuracy", "nfe") if k in metrics}, refresh=False
            )
            bar.update(done - bar.n)
            if total is not None and done >= total:
                bar.close()  # the comparison that follows is not training time

        yield update
