"""Who decides: every arm is a GrowthPolicy."""
