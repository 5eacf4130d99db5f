"""A swarm: an orchestrator that gives parts of a task to agents, which work at the same time."""
