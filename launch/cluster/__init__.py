"""Clusters: runs and studies as SLURM jobs, and one run on several machines over ssh."""
