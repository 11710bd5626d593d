"""Use a finished run: find its folder, merge its adapter, evaluate it, chat with it."""
