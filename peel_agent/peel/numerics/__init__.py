"""Least squares, intervals, losses, streams: what every quantity is computed with."""
