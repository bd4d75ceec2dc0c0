"""The live page of a service, and its figures.

The page is a single file that fetches only `frames`, every two seconds, from the same server. A frame is computed from
two scrapes of the service's metrics, as for `cascade top`, and only while a page asks: reading meters costs power.
"""

from streaming.service.live.routes import live_routes

__all__ = ["live_routes"]
