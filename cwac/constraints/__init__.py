"""What defences preserve of the aligned model, and how: anchors, subspaces and projections, autoencoders, targets.

May import the packages core, data and models.
"""
