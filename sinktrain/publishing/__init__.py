"""From a run to a Hugging Face folder."""
