"""What a plugin is: base classes, options, discovery through entry points, plugin files, the guard around their code, trust, observers.

Importing it costs no torch, and it knows no component by name. Which components a run uses is said in ddkit.recipes.
"""
