"""The live page of a service, and the figures that it draws.

The page is one file: nothing in it is fetched but `frames` from the same server, every two seconds. A frame is made
from two scrapes of the service's own metrics, as for `cascade top`, and only while somebody asks: metering costs power.
"""

from streaming.live.routes import live_routes

__all__ = ["live_routes"]
