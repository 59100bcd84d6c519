"""What the server shows of this plugin. Needs `nexus_ext[server]`, as the server itself does."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nexus_template.observer import tokens


class Metrics:
    """Asked each time that /metrics is."""

    def collect(self) -> Iterator[Metric]:
        what = "Tokens generated, by how the request ended."
        family = CounterMetricFamily("nexus_template_tokens", what, labels=("outcome",))
        for outcome, n in tokens.items():
            family.add_metric((outcome,), n)
        yield family


async def show(request: Request) -> JSONResponse:
    return JSONResponse({"tokens": sum(tokens.values())})


def routes() -> list[Route]:
    return [Route("/template", show, methods=["GET"])]
