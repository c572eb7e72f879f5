"""What survives a kill: atomic files, checksums, the journal and the receipt of a job, its processes and its errors."""
