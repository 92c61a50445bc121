"""Real images: which of them a run may use, reading and resizing them, keeping them decoded, normalisation, pictures, spectra.

The datasets themselves are plugins. The synthetic images are in ddkit.engine while they are optimised, and in ddkit.run as files.
"""
