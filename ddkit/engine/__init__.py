"""The loop: the synthetic set, what a step is made of, the weighted sum of the losses, chunks of classes, and what is decided by itself.

It knows no loss by name and writes no file: ddkit.run gives it its parts, and keeps what it makes.
"""
