"""The drivers: each carries jobs out in one way, behind the ports of `app.engine.ports`."""
