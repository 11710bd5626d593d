"""Read the TOML files of recipes/ into facts, and refuse what is not known."""
