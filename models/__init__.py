"""Everything that touches weights: masking, generation, packing, losses, training."""
