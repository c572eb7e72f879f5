"""`skymoe doctor --gpu` tries on the user's GPUs what the project's own tests try on a CPU."""
