"""One run and its files: set up from a recipe, carried out, kept, evaluated, reported, blended, exported and imported.

The public functions are in ddkit.api. Several runs that make a table are in ddkit.studies.
"""
