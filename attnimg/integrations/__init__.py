"""Callbacks and plugins for other trainers."""
