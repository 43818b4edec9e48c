"""The kinds of work that the tab and the API start."""
