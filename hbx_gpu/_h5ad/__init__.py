"""Reading AnnData .h5ad files: encodings, matrices and columns, without loading them whole."""
