"""What passes through the layers of a model, summed up for the methods."""
