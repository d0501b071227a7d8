"""What a model needs and how long it takes on machines one may not have, from its config alone, and how to split it."""

from jdsi.models.work import Workload

from .candidate import Candidate, Goal, Request
from .collectives import Collective, collectives_of
from .compile import CompiledStage, compile_step
from .cost_model import StageTime, StepTime, collectives_seconds, predict, step_time
from .costs import Operation, StageCosts, stage_costs
from .machine import Link, Machine, machine_for
from .memory import Memory, stage_memory
from .plan import Plan, PlannedStage, make_plan
from .search import Choice, choose
from .shares import even_stages, parameter_count

__all__ = [
    "Candidate",
    "Choice",
    "Collective",
    "CompiledStage",
    "Goal",
    "Link",
    "Machine",
    "Memory",
    "Operation",
    "Plan",
    "PlannedStage",
    "Request",
    "StageCosts",
    "StageTime",
    "StepTime",
    "Workload",
    "choose",
    "collectives_of",
    "collectives_seconds",
    "compile_step",
    "even_stages",
    "machine_for",
    "make_plan",
    "parameter_count",
    "predict",
    "stage_costs",
    "stage_memory",
    "step_time",
]
