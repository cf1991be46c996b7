"""Which gene is which: the column that identifies features, chosen for all files of a collection together."""
