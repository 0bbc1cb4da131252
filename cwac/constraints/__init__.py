"""What a defence holds on to: anchors, subspaces and projections, autoencoders, targets; may import core to models."""
