"""Code around model weights: masking, loading, packing, losses, generation, judging and training."""
