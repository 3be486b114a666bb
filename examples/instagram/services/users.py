"""The service of users: register, log in, profiles."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.instagram import operations, passwords
from examples.instagram.models import User
from examples.instagram.serving import NAME, application, asking, sent, storage, tokens, user_name


async def register(request: Request) -> Response:
    name, password = await sent(request, "name", "password")
    if not NAME.fullmatch(name):
        raise HTTPException(400, "a name has 1 to 30 of a-z, 0-9 and _")
    kept = await asyncio.to_thread(passwords.hashed, password)
    user = await storage(request).run(operations.add_user, name, kept)
    return JSONResponse(_shown(user), 201)


async def login(request: Request) -> Response:
    name, password = await sent(request, "name", "password")
    try:
        user = await storage(request).run(operations.user_named, name)
    except operations.NotFound:
        user = None
    if user is None or not await asyncio.to_thread(passwords.matches, password, user.password):
        raise HTTPException(401, "name or password is wrong")
    return JSONResponse({"token": tokens(request).make(user.id)})


async def profile(request: Request) -> Response:
    user, posts = await storage(request).run(operations.profile, user_name(request))
    return JSONResponse({**_shown(user), "posts": posts})


async def edit(request: Request) -> Response:
    user_id = asking(request)
    (bio,) = await sent(request, "bio")
    return JSONResponse(_shown(await storage(request).run(operations.edit_bio, user_id, bio)))


def _shown(user: User) -> dict[str, Any]:
    return {"id": str(user.id), "name": user.name, "bio": user.bio, "joined": user.joined.isoformat()}


routes = [
    Route("/register", register, methods=["POST"]),
    Route("/login", login, methods=["POST"]),
    Route("/profile", edit, methods=["PUT"]),
    Route("/users/{name}", profile),
]
app = application(routes)
