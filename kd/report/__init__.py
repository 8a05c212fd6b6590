"""Tables, figures and the page of a sweep, from its files alone: `python -m kd.report DIR`."""
