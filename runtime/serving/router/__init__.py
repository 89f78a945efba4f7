"""Several engines of this host behind one address: processes, a router with affinity, metrics.

It needs the packages of the extra `serve`, so nothing else of the runtime imports it.
"""

from tokenspeed_plan.runtime.serving.router.fleet import Launch
from tokenspeed_plan.runtime.serving.router.router_server import RouterOptions, serve_replicas

__all__ = ["Launch", "RouterOptions", "serve_replicas"]
