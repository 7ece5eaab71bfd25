"""Adapters: each binds any policy to one engine, and imports that engine only when it is used."""
