"""Plan and schedule sweeps of many runs, and search hyperparameters with Optuna."""
