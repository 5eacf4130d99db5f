"""The engine: requests in, tokens out. Schedules, runs the model, samples; knows nothing of terminals or HTTP."""
