"""The one error tree. Messages carry the value and the remedy; the exit code says whose fault it was."""

from __future__ import annotations


class GossipflError(Exception):
    """Base of every error that gossipfl raises on purpose."""

    exit_code = 1


class ConfigError(GossipflError):
    """A scenario, an option or an argument cannot be right: the caller's to mend."""

    exit_code = 2


class LayoutError(ConfigError):
    """A model, a vector or a segmentation does not fit the layout it is used with."""


class DataError(ConfigError):
    """A data set is missing, unreadable or too small for what is asked of it."""


class PlanError(ConfigError):
    """A model cannot be cut, or no plan keeps within what is allowed."""


class RunError(GossipflError):
    """A run could not be carried out: too few peers joined or finished, a process died, a port is taken."""


class CodecError(GossipflError):
    """Bytes that are no encoding of the values they claim to be, or hold values that are not finite."""


class RemoteProtocolError(GossipflError):
    """A peer sent what the protocol does not allow. Never raised into a user's code: counted and reported."""
