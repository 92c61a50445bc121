"""Deep support vectors: the losses `dkkt-primal` and `dkkt-stationarity`, the group `dkkt`, and the paper's recipes."""
