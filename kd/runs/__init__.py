"""Runs as files: what lies in their directories, and where they are. Nothing here imports torch."""
