"""A small Instagram on shardkit: users, posts, comments, likes; as one web application, and as four services.

`models` and `operations` are the application and know of no shards but for the decorators of the models; `storage` is
where it meets its database, or its shards; everything else speaks HTTP.
"""
