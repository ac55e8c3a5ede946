"""What an update rule is made of: base class, split of matrices, hyper-parameters, groups, fragments, owners."""
