"""Preference models that are CLIPs."""
