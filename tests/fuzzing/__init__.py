"""Damaged and invented files for every reader of the package; ``run.py`` feeds them by the ten thousand."""
