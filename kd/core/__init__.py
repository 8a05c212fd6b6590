"""Building blocks for all of kd: errors, files, locks, signals, random states and the console."""
