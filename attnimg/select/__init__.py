"""Select an attention backend for a model: pure rules on plain values, without torch."""
