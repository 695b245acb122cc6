"""Who may talk to whom: the topology of the overlay network."""

from gossipfl.overlay.topology import TOPOLOGIES, Topology, build_topology, metropolis_hastings

__all__ = ["TOPOLOGIES", "Topology", "build_topology", "metropolis_hastings"]
