"""Judge an encoder by object detection and instance segmentation, with the architecture of ViTDet."""
