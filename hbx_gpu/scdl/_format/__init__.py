"""The files of an SCDL archive: layout, header, labels, features, pointers."""
