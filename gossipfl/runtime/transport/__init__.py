"""Messages over ZeroMQ: a ROUTER that others connect to, and one DEALER for each endpoint that is asked for something.

    transport = ZmqTransport("tcp://127.0.0.1:0", run=run)
    transport.connect("p1", address)
    transport.send("p0", "p1", message)
    for happening in transport.receive(timeout_s): ...          # Incoming, LinkUp, LinkDown

happenings      what a transport tells
zmq_transport   sends and receives for the peers at one endpoint
link            an outgoing connection: what is asked, and what may still come in answer
inbound         an incoming connection: what is queued for it in answer
window          flow control: how many bytes may be under way on a connection
wakeup          ends a wait from another thread
sockets         what ZeroMQ's sockets are told, and the frames of one message
"""

from gossipfl.runtime.transport.happenings import Happening, Incoming, LinkDown, LinkUp, Origin, Shared
from gossipfl.runtime.transport.zmq_transport import ZmqTransport

__all__ = ["Happening", "Incoming", "LinkDown", "LinkUp", "Origin", "Shared", "ZmqTransport"]
