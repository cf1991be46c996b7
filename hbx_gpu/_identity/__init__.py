"""Identification of genes: the column of feature ids, chosen for all files of a collection together."""
