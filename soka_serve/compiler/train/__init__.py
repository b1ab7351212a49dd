"""Fine-tuning: the model that trains, the loop, and its checkpoints."""
