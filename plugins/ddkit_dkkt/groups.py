"""Loss groups; importing this costs no torch."""

from __future__ import annotations

import ddkit


class Dkkt(ddkit.LossGroup):
    """The DeepKKT loss: primal feasibility and stationarity, [P Eq. 4]; the stationarity rate is its weight."""

    members = ("dkkt-primal", "dkkt-stationarity")
