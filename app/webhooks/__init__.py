"""The way of webhooks to their receivers."""
