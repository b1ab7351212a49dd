"""Fine-tuning: the model that trains, the loop, checkpoints, and the baselines."""
