"""Everything that survives a kill: atomic files, checksums, and a job's journal, receipt, processes and errors."""
