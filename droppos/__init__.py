"""DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions (Wang et al., NeurIPS 2023)."""
