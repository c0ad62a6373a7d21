"""LM head and loss by chunks of tokens: logits of the whole micro-batch are never held."""
