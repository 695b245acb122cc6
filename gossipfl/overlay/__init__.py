"""Who may talk to whom: the topology of the overlay network."""

from gossipfl.overlay.graphs import Topology
from gossipfl.overlay.topology import build_topology
from gossipfl.overlay.topology_kinds import TOPOLOGIES

__all__ = ["TOPOLOGIES", "Topology", "build_topology"]
