"""The method itself, torch only; read beside docs/algorithm.md."""
