"""Clusters from files: check them, start them, reach them, keep them closed."""
