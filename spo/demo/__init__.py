"""The small checkpoint that comes with the project, its taste, and the demonstration."""
