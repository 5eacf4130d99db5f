"""Tools that a model may call: files of one folder, a Python runner, and the tools of MCP servers. `box.ToolBox` holds
them."""
