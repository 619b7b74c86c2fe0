"""OpenAI's interface in front of a Triton server with our repository: a process of its own, see `ngpt-deploy openai`."""
