"""What stays on disk: run folders, and files that are whole or not there."""
