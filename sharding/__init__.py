"""Meshes, partition rules, collectives: how arrays and programs are spread over devices."""

from .collectives import (
    AXES,
    DATA,
    EXPERT,
    PIPE,
    TENSOR,
    all_gather,
    all_max,
    all_min,
    all_reduce,
    axis_index,
    axis_size,
    is_split,
    own_part,
    own_share,
    reduce_scatter,
)
from .division import ByHeads, Division, Evenly
from .mesh import Parallelism, make_mesh, stage_meshes
from .processes import initialize
from .rules import MESH_AXES, TENSOR_PARALLEL, AxisRules, LogicalAxes
from .schedule import PipelineSchedule, split_layers, wavefront
from .split import HeadSplit, Run, Split, joined, split_evenly, split_heads

__all__ = [
    "AXES",
    "DATA",
    "EXPERT",
    "MESH_AXES",
    "PIPE",
    "TENSOR",
    "TENSOR_PARALLEL",
    "AxisRules",
    "ByHeads",
    "Division",
    "Evenly",
    "HeadSplit",
    "LogicalAxes",
    "Parallelism",
    "PipelineSchedule",
    "Run",
    "Split",
    "all_gather",
    "all_max",
    "all_min",
    "all_reduce",
    "axis_index",
    "axis_size",
    "initialize",
    "is_split",
    "joined",
    "make_mesh",
    "own_part",
    "own_share",
    "reduce_scatter",
    "split_evenly",
    "split_heads",
    "split_layers",
    "stage_meshes",
    "wavefront",
]
