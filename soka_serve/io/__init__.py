"""Files and text that every room reads and writes: whole files only, bounded reading, the lock file, output folders."""
