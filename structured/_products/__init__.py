"""Products of matrices: what is multiplied how, on a CPU and on a GPU."""
