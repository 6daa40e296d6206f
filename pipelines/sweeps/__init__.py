"""What `esper sweep` is made of: who takes part, stages, trials under Ray Tune, what is kept of them."""
