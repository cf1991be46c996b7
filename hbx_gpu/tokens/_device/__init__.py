"""The device engine of tokens: constants of a recipe, memory and launches of a batch."""
