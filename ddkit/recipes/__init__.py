"""A run as data: the tables of a recipe, where its values come from and which of them wins, and its JSON schema.

It builds nothing: the objects of a recipe are made in ddkit.run.setup. Torch is not imported here.
"""
