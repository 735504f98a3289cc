"""A synthetic world of moving shapes: clips, frames, questions, and a benchmark."""
