"""From conditions on obs to rows, sources and results."""
