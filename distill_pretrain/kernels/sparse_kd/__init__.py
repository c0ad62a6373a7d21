"""Cross-entropy + sparse forward KL on vocab-parallel logits."""
