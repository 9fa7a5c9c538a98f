"""MaPeT: masked and permuted pre-training of Vision Transformers (see README.md)."""
