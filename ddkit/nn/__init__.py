"""Networks: building and re-drawing them, features, training, teachers, and how they are computed (device, precision, compiled or not).

The architectures are plugins. What a step does with a network is in ddkit.engine.
"""
