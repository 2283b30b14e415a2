"""Who am I among the processes? Read once from the environment, then plain data.

place.py      the answer
launchers.py  who may have started this process, most specific first, and how each says it
slurm.py      Slurm's steps
engines.py    what starts one process on each of several nodes
mpi.py        Open MPI, MPICH and Intel MPI, and LSF
processes.py  what the system tells of another process
variables.py  reading numbers, lists of hosts, and names
"""

from __future__ import annotations

from fabric_lite.topology.engines import is_node_of_several
from fabric_lite.topology.launchers import read_topology, topology_of_group
from fabric_lite.topology.mpi import check_mpi4py
from fabric_lite.topology.place import ALONE, Topology
from fabric_lite.topology.slurm import is_lone_shell

__all__ = [
    "ALONE",
    "Topology",
    "check_mpi4py",
    "is_lone_shell",
    "is_node_of_several",
    "read_topology",
    "topology_of_group",
]
