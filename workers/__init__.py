"""GrowthRun, the Ray actor around it, and what runs inside: tolaria (training engine) and kasmina (growth)."""
