"""Write the files that programs read: bake file, kernel builds, constraints, data, CI matrix."""
