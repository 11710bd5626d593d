"""Select an attention backend for a model, with pure functions and without torch."""
