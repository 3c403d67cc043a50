"""Where a device has too little memory: how many prompts would fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class DeviceMemoryError(ValueError):
    """The device has too little memory; the message says how many prompts at once fit."""


@contextmanager
def out_of_memory(prompts: int, attempt: Callable[[int], None]) -> Iterator[None]:
    """Turns running out of a device's memory into DeviceMemoryError, which says what fits.

    Args:
        prompts: pairs of prompts that were run at once.
        attempt: runs one step of so many pairs.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        fits = largest(prompts, attempt)
        what = f"{fits} fit: give rows {2 * fits} and pairs {fits} at most" if fits else "not even one pair fits"
        raise DeviceMemoryError(
            f"rows: {prompts} pairs of prompts at once exceed the device's memory; {what}"
        ) from error


def largest(prompts: int, attempt: Callable[[int], None]) -> int:
    """The largest number of pairs, by halving, for which `attempt` does not run out of memory; 0 where none is."""
    while prompts > 0:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(prompts)
        except torch.OutOfMemoryError:
            prompts //= 2
            continue
        return prompts
    return 0
