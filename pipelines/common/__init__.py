"""What every command starts with: its arguments, its output folder, the episode loop, progress, stopping."""
