"""What every other part of kd may use: errors, files, locks, signals, random states, the console."""
