"""The typed configuration: its schema, its validation and the identity it gives a run."""
