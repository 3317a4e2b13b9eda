"""Folder formats: each file holds one format's `write`, `read` and `fits`, side by side."""
