"""OpenAI's HTTP API over an engine.

It needs the packages of the extra `serve`, so nothing else of the runtime imports it.
"""

from tokenspeed_plan.runtime.serving.http.callers import check_reach
from tokenspeed_plan.runtime.serving.http.server import ServerOptions, listen, serve

__all__ = ["ServerOptions", "check_reach", "listen", "serve"]
