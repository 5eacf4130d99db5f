"""`python -m tests.apps.server.small_serve ARGS`: `kimi-lite serve` with a plan that has memory for few of a tiny
model's experts, so that the others are read from its file and their heat is kept.
"""

from dataclasses import replace

from kimi_lite import cli
from kimi_lite.engine import loader
from kimi_lite.engine.planning import plan_load
from kimi_lite.plan.types import Plan

EXPERT_BYTES = 1 << 20  # of about 3 MB


def plan_small(*arguments: object) -> Plan:
    """The real plan with less memory for experts."""
    return replace(plan_load(*arguments), ram_expert_bytes=EXPERT_BYTES, disk_expert_bytes=1)


if __name__ == "__main__":
    loader.plan_load = plan_small
    cli.main()
