"""The four services: each an application of its own, on the storage that they share.

What lives together in the storage need not be served together: the service of likes reads and writes beside the posts,
on their shards, and asks no other service for anything. Each of them is `uvicorn examples.instagram.services.NAME:app`.
"""
