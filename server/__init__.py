"""Front end: tokenising, detokenising, chat templates, stop strings; later the OpenAI-compatible HTTP API."""
