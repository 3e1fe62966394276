"""Training: a recipe and a data set in, a checkpoint out."""
