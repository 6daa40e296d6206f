"""The arms that only a sweep has, and the kinds of arms that planning and judging tell apart. Imports no torch."""

from esper.policies.named_schedules import NAMED

STATIC, RANDOM = "static", "random"
OPENLOOP = "openloop"  # plays the median schedule of the trained policy's own tuning runs
FINAL = "static_final"  # the shape that another arm ended with, from scratch
LRPATH = "static_lrpath"  # the best static size, under the learning rate that another arm had
MADE_HERE = (OPENLOOP, FINAL, LRPATH)  # of what a sweep has found out itself
FOLLOWERS = (RANDOM, FINAL, LRPATH)  # follow another arm's run on the same seed
NOT_GROWN = (STATIC, FINAL, LRPATH)
SCHEDULES = ("schedule", *NAMED)
