"""Text from templates; the only place that uses Jinja."""

from tokenspeed_plan.codegen.chat_template import ChatTemplate

__all__ = ["ChatTemplate"]
