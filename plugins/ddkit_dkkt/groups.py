"""Loss groups; importing this costs no torch."""

from __future__ import annotations

import ddkit


class Dkkt(ddkit.LossGroup):
    """The DeepKKT loss: primal feasibility and stationarity; the stationarity rate is the weight of the second.

    Source: Lee, Lee, Kwak, Practical Dataset Distillation Based on Deep Support Vectors, arXiv 2405.00348, Eq. 4.
    """

    members = ("dkkt-primal", "dkkt-stationarity")
