"""The public language-model track: fixed data and batch, fewest steps to a loss."""
