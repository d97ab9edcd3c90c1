"""The training wing: the plan of batches, checkpoints, the loop."""
