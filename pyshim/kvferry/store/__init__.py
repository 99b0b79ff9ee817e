"""Keeps blocks and checkpoints, and finds them again."""
