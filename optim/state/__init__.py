"""What an update rule keeps: subspaces, moments and how they are stored, keys of randomness."""
