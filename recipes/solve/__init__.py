"""Turn an image's facts into a plan; resolve its packages and fetch the sources of its kernels."""
