"""Export of trained encoders to open_clip, transformers and timm."""
