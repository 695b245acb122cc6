"""An emulated network around real sockets, in user space: what peers send each other is as fast, late and unreliable as the
scenario says, without root and whatever the machine really manages.

    emulation = Emulation(("p0", "p1"), seed=0, links=links, devices=None)
    transport = ShapedTransport("tcp://127.0.0.1:0", run=run, emulation=emulation)     # drives like a ZmqTransport

`emulation` is what is emulated, as plain values; `capacities` shares uplinks and downlinks, without a clock or a socket;
`shaped_transport` has the sockets' messages take the time that these say. How:

    uplink     at the sender: what it sends each peer is a flow, and all its flows leave as a fluid, at max-min fair rates
    pair       bounds the rate of the flow
    latency    a chunk is put on the socket when its last byte has left, and the latency with its jitter is over
    loss       ... or never
    downlink   at the receiver: chunks are let through one by one at its rate, by start-time fair queueing (P. Goyal, H. Vin,
               H. Cheng, SIGCOMM 1996), as if each had come in while it left its sender
    window     a flow rests while its receiver has a window of it that is not let through: others have the uplink meanwhile.
               Flow control by credits over fair queues comes to max-min fair rates (E. Hahne, IEEE JSAC 9(7), 1991)

The sharing of capacities follows the virtual clock's, max-min fair (`simulation/network.py`), with nobody who sees it all.
"""

from gossipfl.runtime.shaping.emulation import Emulation
from gossipfl.runtime.shaping.shaped_transport import ShapedTransport

__all__ = ["Emulation", "ShapedTransport"]
