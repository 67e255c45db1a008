"""What outlives a step: checkpoints, and the plan of what is stored."""
