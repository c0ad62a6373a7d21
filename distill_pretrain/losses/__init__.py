"""What a model minimises: kernels and their collectives."""
