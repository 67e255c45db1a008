"""What every structure stands on: operators, records of tensors, the base class, specs."""
