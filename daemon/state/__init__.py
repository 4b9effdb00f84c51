"""Everything that the daemon remembers: one SQLite file, one writer, each change with its audit row."""
