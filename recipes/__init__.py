"""What train.py and eval.py call: configuration, data, tasks, optimiser, checkpoints of a run, logging."""
