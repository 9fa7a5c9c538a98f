"""What the papers are measured against: a supervised ViT (DeiT) and pixel reconstruction (MAE), with recipes of their own."""
