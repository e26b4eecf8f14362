"""TODO distributions."""
