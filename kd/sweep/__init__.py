"""Many runs: planning, scheduling, searching."""
