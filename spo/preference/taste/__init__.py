"""Votes, and the small step-aware head fitted to them."""
