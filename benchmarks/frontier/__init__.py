"""The frontier of loss against optimizer state: a rule for the matrices, one for the vocabulary."""
