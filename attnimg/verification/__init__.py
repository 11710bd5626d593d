"""Check the planned attention with real calls on this machine, before and during training."""
