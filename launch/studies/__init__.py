"""Studies: which runs a comparison takes, from the command line or a written file, and running them side by side."""
