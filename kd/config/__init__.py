"""The typed configuration: what is allowed, and what determines a result."""
