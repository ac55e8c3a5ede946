"""The law that says which data to train on. Public names: `thriftlab.data.curation_law`."""
