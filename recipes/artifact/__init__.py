"""What is in a finished image or wheelhouse: files read once into facts, for gates to judge.

An artifact is read without a daemon and without running anything of it.
"""
