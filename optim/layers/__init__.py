"""Layer methods: what stands in the place of a Linear, one a file."""
