"""The service of likes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.instagram import operations
from examples.instagram.serving import application, asking, post_id, storage


async def like(request: Request) -> Response:
    await storage(request).run(operations.like, asking(request), post_id(request))
    return Response(status_code=204)


async def unlike(request: Request) -> Response:
    await storage(request).run(operations.unlike, asking(request), post_id(request))
    return Response(status_code=204)


async def by_post(request: Request) -> Response:
    return JSONResponse(await storage(request).run(operations.likes_by_post, post_id(request)))


routes = [
    Route("/posts/{post:uuid}/like", like, methods=["PUT"]),
    Route("/posts/{post:uuid}/like", unlike, methods=["DELETE"]),
    Route("/posts/{post:uuid}/likes", by_post),
]
app = application(routes)
