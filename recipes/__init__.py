"""How things that the project ships were made."""
