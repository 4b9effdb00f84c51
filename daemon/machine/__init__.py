"""What the daemon has of its machine: the supervisor and its units, memory, mounts, room on the disk."""
