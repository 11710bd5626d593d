"""Read the contents of a finished image or wheelhouse, for the gates to check.

Reading needs no Docker daemon, and runs nothing of the artifact.
"""
