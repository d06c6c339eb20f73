"""A training run: its set-up, its state and resumption, its logs."""
