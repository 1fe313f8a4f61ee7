"""Gaze over objects: search trials, models that predict where people look next, and how such predictions are scored."""
