"""Build tables, figures and the page of a sweep from its files: `python -m kd.report DIR`."""
