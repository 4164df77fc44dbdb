"""Training on the base's own answers (`--on-policy N`): written once before the training, then read in place of the data's."""
