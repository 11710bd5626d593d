"""Turn an image's recipe into a plan; resolve its packages and fetch its kernels' sources."""
