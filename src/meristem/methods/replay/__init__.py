"""Replay: rows of earlier tasks, trained on again."""
