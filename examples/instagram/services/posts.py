"""The service of posts: writing them, those of a user, the feed."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.instagram import operations
from examples.instagram.operations import PostView
from examples.instagram.serving import application, asking, before, post_id, sent, storage, user_name


async def write(request: Request) -> Response:
    user_id = asking(request)
    (text,) = await sent(request, "text")
    post = await storage(request).run(operations.add_post, user_id, text)
    return JSONResponse({"id": str(post.id)}, 201)


async def one(request: Request) -> Response:
    return JSONResponse(_shown(await storage(request).run(operations.view_post, post_id(request))))


async def by_user(request: Request) -> Response:
    user = await storage(request).run(operations.user_named, user_name(request))
    found = await storage(request).run(operations.posts_by_user, user.id, before(request))
    return JSONResponse([_shown(view) for view in found])


async def feed(request: Request) -> Response:
    found = await storage(request).run(operations.feed, before(request))
    return JSONResponse([_shown(view) for view in found])


def _shown(view: PostView) -> dict[str, Any]:
    return {
        "id": str(view.post.id),
        "user": view.author,
        "text": view.post.text,
        "made": view.post.made.isoformat(),
        "comments": view.comments,
        "likes": view.likes,
    }


routes = [
    Route("/posts", write, methods=["POST"]),
    Route("/posts/{post:uuid}", one),
    Route("/users/{name}/posts", by_user),
    Route("/feed", feed),
]
app = application(routes)
