"""One short declarative file per model family: Hugging Face config to DecoderSpec, checkpoint names to parameters."""
