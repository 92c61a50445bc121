"""Tables of papers: systems times cells as data, the sets that they need, carrying them out, sharing the work, and the figures.

Each set is a run, made by the commands of ddkit in a process of its own.
"""
