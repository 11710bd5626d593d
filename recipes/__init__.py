"""Recipes of the images: TOML files, and the code that generates files from them.

Data: images/ has one file per image, kernels/ one per kernel package, patches/ the changes to the
kernels' sources, and each *.toml here has one subject. Code: `python -m recipes render` runs
read.py, solve/, render/ and pages/ in this order; `python -m recipes gate` reads an image with
artifact/ and checks it with gates/. Images contain none of this.
"""
