"""Losses of published methods, one module each, named after what it computes; their recipes, named as in the papers, are in `recipes`."""
