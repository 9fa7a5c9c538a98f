"""Semantic segmentation with an encoder of this project, of an official code or of timm: see README.md."""
