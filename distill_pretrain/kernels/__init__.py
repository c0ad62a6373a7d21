"""Operations with a reference in plain PyTorch; CUDA sources live beside it."""
