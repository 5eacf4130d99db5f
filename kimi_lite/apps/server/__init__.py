"""The OpenAI- and Anthropic-compatible server. `app.build_app` is the ASGI application; `command` runs
it.

Every API's request becomes one `chat.ChatRequest`, every answer one stream of the engine's tokens.
"""
