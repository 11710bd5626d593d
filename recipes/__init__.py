"""Recipes of the images: TOML files, and the code that generates files from them.

Data: images/ has one file per image, kernels/ one per kernel package, patches/ the changes to the
kernels' sources, and each *.toml here has one subject. Code: `python -m recipes render` runs read/,
solve/, render/ and pages/ in this order; artifact/ and gates/ check what was built. Images contain
none of it.
"""
