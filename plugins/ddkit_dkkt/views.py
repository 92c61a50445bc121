"""The option of both DKKT losses that says which views they are evaluated on."""

from __future__ import annotations

from typing import Annotated

import ddkit

# By name of the view the factor of its value, above 0: with a factor below 0 a loss would lead away from what it asks for.
Views = Annotated[
    dict[str, Annotated[float, ddkit.Option(gt=0)]], ddkit.Option("views it is evaluated on, with factors above 0", min_length=1)
]
