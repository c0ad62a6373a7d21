"""Initial weights, residual scaling and what theory says of them."""
