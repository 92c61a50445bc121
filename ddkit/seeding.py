"""Randomness as a function of (seed, purpose, step): nothing is seeded globally, nothing comes from the clock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed for `purpose` of a run seeded with `seed`; different purposes are independent."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a fresh CPU generator for `purpose`.

    Examples:
        >>> first, second = (torch.randn(2, generator=ddkit.generator(0, "noise", step)) for step in (7, 7))
        >>> torch.equal(first, second)
        True
    """
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


@contextmanager
def drawn_from(seed: int, *purpose: str | int) -> Iterator[None]:
    """Inside, torch's default CPU generator is that of `purpose`; afterwards it is as before.

    For code that can only draw from the default generator: the constructors of torch modules.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, *purpose))
        yield
