"""The public API: what `distill_pretrain` itself hands out, for loops that are not this project's own."""
