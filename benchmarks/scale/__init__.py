"""What optimizers cost on many GPUs: calculated, and checked against small runs on a few ranks."""
