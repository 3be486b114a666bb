"""The service of comments."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.instagram import operations
from examples.instagram.serving import application, asking, post_id, sent, storage


async def write(request: Request) -> Response:
    author_id = asking(request)
    (text,) = await sent(request, "text")
    made = await storage(request).run(operations.comment, author_id, post_id(request), text)
    return JSONResponse({"id": str(made.id)}, 201)


async def by_post(request: Request) -> Response:
    found = await storage(request).run(operations.comments_by_post, post_id(request))
    return JSONResponse(
        [
            {
                "id": str(comment.id),
                "user": author,
                "text": comment.text,
                "made": comment.made.isoformat(),
            }
            for comment, author in found
        ]
    )


routes = [
    Route("/posts/{post:uuid}/comments", write, methods=["POST"]),
    Route("/posts/{post:uuid}/comments", by_post),
]
app = application(routes)
