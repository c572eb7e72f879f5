"""`skymoe launch` translates the hydra groups in `conf/` into recipes, executors and one NeMo-Run experiment."""
