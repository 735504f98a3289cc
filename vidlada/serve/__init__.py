"""The server: an engine that batches requests step by step, and an OpenAI-compatible interface to it."""
