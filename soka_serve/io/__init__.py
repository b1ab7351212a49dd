"""Input and output for all rooms: atomic writing, bounded reading, soka.lock, output folders, console and text."""
