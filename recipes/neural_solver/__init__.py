"""Neural-Solver-Library's attention with spatial distances: data, training, times, scale."""
