"""Measurements behind `vidlada bench`: interleaved repeats, medians, ratios to a baseline of the same run."""
