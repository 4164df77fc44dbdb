"""OpenAI's chat completions: what may be asked, how it is read, and how an answer is told."""
