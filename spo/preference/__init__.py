"""Preference models: what names the best and the worst candidate."""
