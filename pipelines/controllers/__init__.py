"""What `esper ppo` and `esper policy` are made of: training a controller, its live view, its evaluation."""
