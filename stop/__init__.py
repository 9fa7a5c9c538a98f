"""StoP: stochastic positional embeddings for masked image modelling, and I-JEPA, on which it builds (see README.md)."""
