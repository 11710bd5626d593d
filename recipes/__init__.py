"""What each image is made of: TOML files, and the code that turns them into files.

Data: images/ and kernels/ have one file an image and a kernel package, patches/ what is changed in
sources, *.toml one table a subject. Code: read/, solve/, render/ and pages/ run in this order, by
`python -m recipes render`; artifact/ and gates/ judge what was built. Never inside an image.
"""
