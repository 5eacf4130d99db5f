"""What users touch: chat, run. They see only `engine.Engine` and never import torch."""
