"""A server for a model with maps: OpenAI's API for completions and chats, at strengths of each request, and a page."""
