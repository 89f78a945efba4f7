"""Several engines behind one address: a fleet of them, a router with affinity, metrics.

It needs the packages of the extra `serve`, so nothing else of the runtime imports it.
"""

from tokenspeed_plan.runtime.serving.router.fleet import Launch
from tokenspeed_plan.runtime.serving.router.replica_process import Life, how_ended, on_this_host
from tokenspeed_plan.runtime.serving.router.router_server import RouterOptions, serve_replicas

__all__ = ["Launch", "Life", "RouterOptions", "how_ended", "on_this_host", "serve_replicas"]
