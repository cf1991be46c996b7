"""Classes that anndata and scanpy ask for; no matrix is one of them here."""


class spmatrix:
    """Base of the others, as in cupyx."""


class csr_matrix(spmatrix):
    """Rows."""


class csc_matrix(spmatrix):
    """Columns."""


class coo_matrix(spmatrix):
    """Coordinates."""
