"""Prove on the real model and machine what was planned on paper."""
