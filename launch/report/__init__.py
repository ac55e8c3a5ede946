"""Reports: the runs of a study read back, what they say statistically, and the page, tables and figures of it."""
