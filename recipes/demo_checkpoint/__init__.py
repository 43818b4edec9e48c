"""How the demo checkpoint, its preference model and its curves were made."""
