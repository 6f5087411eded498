"""What every package may import: errors, files, locks, caches, sample files and log folders."""
