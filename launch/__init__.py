"""Many runs: the command line, studies and their reports, clusters. Imports the other packages; none imports it."""
