"""What the engine needs from the world, in the engine's words, one file a port.

`app.wiring` plugs the real things in.
"""
